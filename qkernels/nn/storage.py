"""A module's weight outside of the module: in storage layout, in a state_dict, in a pickle."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor, nn

from qkernels import _C, functional
from qkernels.formats import FORMATS, format_of
from qkernels.functional import Quantized
from qkernels.schemes import Scheme

WEIGHT_KEYS = ("weight", "weight_scale", "weight_zero_point")
# What a checkpoint of transformers calls the codes. With `weight`, from_pretrained without
# qkernels.hf would take them for the float weight, and only note scales that it has no use for.
STORED_NAMES = {"weight": "weight_codes"}

# What is said of a weight that was stored before zero points counted in parts of a code.
WHOLE_CODES = (
    "an older qkernels stored it, whose int4 zero points were whole codes; they count in eighths "
    "of a code now, so quantize the float model again"
)


def counts_in_parts(scheme: Scheme) -> bool:
    """Whether stored zero points are parts of a code, which they were not in older files.

    Args:
        scheme: of the weight.
    """
    return not scheme.symmetric and format_of(scheme.format).zero_steps > 1


def quantize_weight(weight: Tensor, scheme: Scheme) -> Quantized:
    """A float matrix quantized as a scheme says.

    Args:
        weight: float32, bfloat16, float16 or float64 (by way of float32) [rows, columns].
        scheme: says format, group size, symmetry and type of scales.
    """
    weight = weight.detach()
    if weight.dtype == torch.float64:
        weight = weight.float()
    return functional.quantize(
        weight, scheme.format, scheme.group_size, scheme.symmetric, scheme.scale_dtype
    )


@dataclass(frozen=True)
class Packing:
    """How a module's weight is packed for the kernels of the device that it is on.

    Args:
        rows: output features, or entries of a table.
        columns: weights of each.
        scheme: names the layout.
        conv: number of taps and of groups, for the weight of a convolution.
    """

    rows: int
    columns: int
    scheme: Scheme
    conv: tuple[int, int] | None = None

    def packed_shape(self, device: str) -> tuple[int, int]:
        """Shape of the packed weight.

        Args:
            device: type of the device that it is for.
        """
        layout, group_size = self.scheme.layout_on(device), self.scheme.group_size
        if self.conv is None:
            blocks = -(-self.rows // _C.BLOCK_ROWS)
            return blocks, _C.block_bytes(layout, self.columns, group_size)
        taps, groups = self.conv
        channels = self.columns // taps
        return _C.conv_packed_shape(layout, taps, channels, groups, self.rows, group_size)

    def pack(self, weight: Quantized) -> Tensor:
        """A quantized matrix, packed.

        Args:
            weight: [rows, columns], quantized as the scheme says.
        """
        layout = self.scheme.layout_on(weight.data.device.type)
        if self.conv is None:
            return functional.pack(weight, layout)
        taps, groups = self.conv
        return functional.pack_conv(weight, layout, taps=taps, groups=groups)

    def unpack(self, packed: Tensor) -> Quantized:
        """The quantized matrix that a packed weight holds.

        Args:
            packed: from `pack`.
        """
        layout, group_size = self.scheme.layout_on(packed.device.type), self.scheme.group_size
        if self.conv is None:
            return functional.unpack(packed, layout, self.rows, self.columns, group_size)
        taps, groups = self.conv
        sizes = (self.rows, self.columns, group_size)
        return functional.unpack_conv(packed, layout, *sizes, taps=taps, groups=groups)

    def moved(self, packed: Tensor, device: torch.device) -> Tensor:
        """A packed weight on a device of another type, packed anew for its kernels.

        Args:
            packed: from `pack`, or on the meta device.
            device: where to.
        """
        if packed.is_meta or device.type == "meta":
            return torch.empty(self.packed_shape(device.type), dtype=packed.dtype, device=device)
        return self.pack(self.unpack(packed).to(device))

    def parameter(self, weight: Quantized) -> nn.Parameter:
        """A quantized matrix as the frozen parameter that a module holds.

        Args:
            weight: [rows, columns], quantized as the scheme says.
        """
        return nn.Parameter(self.pack(weight), requires_grad=False)


def quantized_like(rows: int, columns: int, scheme: Scheme) -> Quantized:
    """Shapes and types of a matrix in storage layout, on the meta device."""
    form = FORMATS[scheme.format]
    groups = 1 if scheme.group_size == -1 else -(-columns // scheme.group_size)

    def empty(width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, width, dtype=dtype, device="meta")

    return Quantized(
        data=empty(form.storage_features(columns), form.storage_dtype),
        scale=empty(groups, scheme.scale_dtype),
        zero_point=None if scheme.symmetric else empty(groups, form.storage_dtype),
        format=scheme.format,
        group_size=scheme.group_size,
        shape=torch.Size((rows, columns)),
    )


def weight_entries(weight: Quantized, prefix: str) -> dict[str, Tensor]:
    """A quantized weight under its state_dict keys.

    Args:
        weight: the weight.
        prefix: what to put before each key.
    """
    tensors = (weight.data, weight.scale, weight.zero_point)
    return {prefix + k: t for k, t in zip(WEIGHT_KEYS, tensors, strict=True) if t is not None}


class SavedWeights(threading.local):
    """Which packed weights the state_dict() call in progress has written, and under which prefix.

    Modules that share a packed weight share the tensors in a state_dict, as float modules do.
    """

    def __init__(self) -> None:
        self._destination: weakref.ref[Any] | None = None
        self._saved: dict[int, tuple[weakref.ref[nn.Module], int, str]] = {}

    def entries(self, module: nn.Module, destination: Any, prefix: str) -> dict[str, Tensor] | None:
        """What a module's packed weight was written as, for use under `prefix`; None if it is new.

        Args:
            module: holds `packed`.
            destination: what state_dict() fills.
            prefix: of the module's keys.
        """
        packed = module.packed
        assert isinstance(packed, Tensor)
        if packed.is_inference():  # has no version to tell whether it has changed
            return None
        if self._destination is None or self._destination() is not destination:
            self._destination, self._saved = _weakly(destination), {}
        saved = self._saved.get(id(packed))
        # A caller may fill one dict by several calls, between which weights change or go.
        if saved is not None and _holds(saved[0](), packed) and saved[1] == packed._version:
            found = {key: destination.get(saved[2] + key) for key in WEIGHT_KEYS}
            if found["weight"] is not None:
                return {prefix + key: tensor for key, tensor in found.items() if tensor is not None}
        self._saved[id(packed)] = (weakref.ref(module), packed._version, prefix)
        return None


def _holds(module: nn.Module | None, packed: Tensor) -> bool:
    return module is not None and module.packed is packed


def _weakly(destination: Any) -> weakref.ref[Any] | None:
    try:
        return weakref.ref(destination)
    except TypeError:  # a plain dict, which only a caller of state_dict(destination=...) passes
        return None


class StorageForm:
    """A packed weight as pickle sees it: its storage layout, which any version and device reads.

    Modules that share a packed weight give pickle the same object, so that they share it again.
    """

    def __init__(self, packed: nn.Parameter, packing: Packing) -> None:
        self.packed = packed
        self._packing = packing

    @classmethod
    def of(cls, packed: nn.Parameter, packing: Packing) -> StorageForm:
        """The one object that stands for a packed weight for as long as someone holds it.

        Args:
            packed: the weight.
            packing: how it is packed.
        """
        form = _forms.get(id(packed))
        if form is None:
            form = _forms[id(packed)] = cls(packed, packing)
        return form

    def __reduce__(self) -> tuple[Any, ...]:
        packing = self._packing
        weight = packing.unpack(self.packed.detach())
        tensors = (weight.data, weight.scale, weight.zero_point)
        shape = (packing.rows, packing.columns)
        steps = format_of(weight.format).zero_steps
        return parameter_from_storage, (*tensors, shape, packing.scheme, packing.conv, steps)


_forms: weakref.WeakValueDictionary[int, StorageForm] = weakref.WeakValueDictionary()


def parameter_from_storage(
    data: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    shape: tuple[int, int],
    scheme: Scheme,
    conv: tuple[int, int] | None = None,
    zero_steps: int = 1,
) -> nn.Parameter:
    """What pickles call, so name and arguments must stay."""
    if counts_in_parts(scheme) and zero_steps != format_of(scheme.format).zero_steps:
        raise ValueError(f"the pickled weight of {scheme} cannot be read: {WHOLE_CODES}")
    weight = Quantized(data, scale, zero_point, scheme.format, scheme.group_size, torch.Size(shape))
    return Packing(*shape, scheme, conv).parameter(weight)


def _share_with_process(form: StorageForm) -> tuple[Any, ...]:
    return _same, (form.packed,)


def _same(packed: nn.Parameter) -> nn.Parameter:
    return packed


# Sent to another process of the same program, a packed weight is shared memory like any parameter.
ForkingPickler.register(StorageForm, _share_with_process)
