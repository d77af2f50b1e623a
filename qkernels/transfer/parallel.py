"""Tensor parallelism for quantized layers: styles for torch's `parallelize_module`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from qkernels import _C
from qkernels.formats import FORMATS
from qkernels.functional import Quantized
from qkernels.nn import QLinear
from qkernels.nn.storage import WEIGHT_KEYS

_REDUCED_BIAS = "reduced_bias"


class QColwiseParallel(ParallelStyle):
    """Cut a QLinear by output features, in rows of its packed weight: x whole, y in parts.

    As torch's ColwiseParallel, which takes only torch's own layers. Each process computes the bits
    that it would alone. Put a QRowwiseParallel behind it, or gather the output.

    Args:
        gather_output: whether y is put together again, so that every process has all of it.

    Raises:
        TypeError: the module is no QLinear.
        ValueError: out_features is no multiple of 16 times the number of processes.

    Example:
        >>> style = qk.transfer.QColwiseParallel()
        >>> # parallelize_module(model, mesh, {"mlp.up": style, "mlp.down": QRowwiseParallel()})
    """

    def __init__(self, *, gather_output: bool = False) -> None:
        super().__init__()
        self.gather_output = gather_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer = _checked(self, module)
        rank, count = device_mesh.get_local_rank(), device_mesh.size()
        unit = _C.BLOCK_ROWS * count
        if layer.out_features % unit:
            raise ValueError(
                f"QColwiseParallel: out_features is {layer.out_features}; expected a multiple of "
                f"{unit}, {_C.BLOCK_ROWS} for each of {count} processes; leave this layer whole"
            )
        rows = layer.out_features // count
        blocks = rows // _C.BLOCK_ROWS
        part = layer.packed.detach()[rank * blocks : (rank + 1) * blocks].clone()
        layer.packed = nn.Parameter(part, requires_grad=False)
        if layer.bias is not None:
            mine = layer.bias.detach()[rank * rows : (rank + 1) * rows].clone()
            layer.bias = nn.Parameter(mine, layer.bias.requires_grad)
        layer.out_features = rows
        layer.shape = (rows, layer.in_features)
        by_rows: dict[str, Placement] = dict.fromkeys((*WEIGHT_KEYS, "bias"), Shard(0))
        _store_as_sharded(layer, device_mesh, by_rows)

        def whole_input(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x = _as_dtensor(inputs[0], device_mesh, Replicate())
            # Each process knows its outputs' part of the gradient to x: they add up.
            return (x.to_local(grad_placements=(Partial(),)), *inputs[1:])

        def whole_output(_: nn.Module, __: Any, y: Tensor) -> Tensor:
            return _local(DTensor.from_local(y, device_mesh, (Shard(-1),)), Replicate())

        layer.register_forward_pre_hook(whole_input)
        if self.gather_output:
            layer.register_forward_hook(whole_output)
        return layer


class QRowwiseParallel(ParallelStyle):
    """Cut a QLinear by input features, between groups: x in parts, y whole.

    As torch's RowwiseParallel, which takes only torch's own layers. The parts' products are added
    in another order than in one process, and a scheme that quantizes activations does so for each
    part with its own scale, so y is close to that of one process but not the same to the bit.

    Args:
        split_input: whether x comes whole and is cut here, instead of in parts.

    Raises:
        TypeError: the module is no QLinear.
        ValueError: in_features cannot be cut between groups into equal parts, or the scheme is
            static.
    """

    def __init__(self, *, split_input: bool = False) -> None:
        super().__init__()
        self.split_input = split_input

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer = _checked(self, module)
        scheme, rank, count = layer.scheme, device_mesh.get_local_rank(), device_mesh.size()
        layer.check_not_fused("adding up parts of the result")
        if scheme.static:
            raise ValueError(
                f"QRowwiseParallel: {scheme} has one measured scale for the whole input; use a "
                "scheme that is not static, or leave this layer whole"
            )
        per_byte = 2 if FORMATS[scheme.format].bits == 4 else 1
        unit = count * (per_byte if scheme.group_size == -1 else scheme.group_size)
        if layer.in_features % unit or layer.in_features // count % per_byte:
            raise ValueError(
                f"QRowwiseParallel: in_features is {layer.in_features}; expected a multiple of "
                f"{unit}, so that {count} processes get whole groups of {scheme}; leave this "
                "layer whole"
            )
        weight, columns = layer.quantized_weight(), layer.in_features // count

        def cut(tensor: Tensor) -> Tensor:
            return tensor.chunk(count, dim=1)[rank].contiguous()

        by_group = scheme.group_size != -1
        zero = weight.zero_point
        part = Quantized(
            cut(weight.data),
            cut(weight.scale) if by_group else weight.scale,
            cut(zero) if by_group and zero is not None else zero,
            weight.format,
            weight.group_size,
            torch.Size((layer.out_features, columns)),
        )
        layer.in_features = columns
        layer.shape = (layer.out_features, columns)
        layer.packed = layer.packing.parameter(part)
        bias = layer.bias
        layer.bias = None
        # Added once, to the sum of the parts.
        layer.register_parameter(_REDUCED_BIAS, bias)
        scales: Placement = Shard(1) if by_group else Replicate()
        placements = dict.fromkeys(WEIGHT_KEYS, scales)
        _store_as_sharded(
            layer, device_mesh, {**placements, "weight": Shard(1), _REDUCED_BIAS: Replicate()}
        )

        def part_of_input(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (
                _local(_as_dtensor(inputs[0], device_mesh, Replicate()), Shard(-1)),
                *inputs[1:],
            )

        def sum_of_parts(_: nn.Module, __: Any, y: Tensor) -> Tensor:
            whole = _local(DTensor.from_local(y, device_mesh, (Partial(),)), Replicate())
            added = layer._parameters[_REDUCED_BIAS]
            return whole if added is None else whole + added.to(y.dtype)

        if self.split_input:
            layer.register_forward_pre_hook(part_of_input)
        layer.register_forward_hook(sum_of_parts)
        return layer


def _checked(style: ParallelStyle, module: nn.Module) -> QLinear:
    name = type(style).__name__
    if type(module) is not QLinear:
        raise TypeError(
            f"{name}: the module is a {type(module).__name__}; expected a QLinear (torch's "
            f"{name.removeprefix('Q')} takes float layers, and adapters are added to whole layers)"
        )
    return module


def _as_dtensor(x: Tensor, mesh: DeviceMesh, placement: Placement) -> DTensor:
    if isinstance(x, DTensor):
        return x.redistribute(mesh, (placement,))
    return DTensor.from_local(x, mesh, (placement,), run_check=False)


def _local(x: DTensor, placement: Placement) -> Tensor:
    return x.redistribute(placements=(placement,)).to_local()


def _store_as_sharded(layer: QLinear, mesh: DeviceMesh, placements: dict[str, Placement]) -> None:
    """Let state_dicts have the keys and sizes of the whole layer, of which each process has a part.

    So any number of processes, or one alone, can load what any other number has saved.
    """

    def spread(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        for name, placement in placements.items():
            tensor = state.pop(prefix + name, None)
            if tensor is not None:
                key = prefix + ("bias" if name == _REDUCED_BIAS else name)
                state[key] = DTensor.from_local(tensor, mesh, (placement,), run_check=False)

    def collect(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
        for name, placement in placements.items():
            tensor = state.pop(prefix + ("bias" if name == _REDUCED_BIAS else name), None)
            if isinstance(tensor, DTensor):
                tensor = _local(tensor, placement)
            elif isinstance(tensor, Tensor) and isinstance(placement, Shard):
                tensor = tensor.chunk(mesh.size(), placement.dim)[mesh.get_local_rank()]
            if tensor is not None:
                state[prefix + name] = tensor

    layer.register_state_dict_post_hook(spread)  # type: ignore[no-untyped-call]
    layer.register_load_state_dict_pre_hook(collect)  # type: ignore[no-untyped-call]
