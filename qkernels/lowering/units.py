"""Convolutions and Linear layers of a captured graph, with what is fused into them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from qkernels import _C
from qkernels.fold import affine_of, fold_tensors
from qkernels.lowering.nodes import (
    BATCH_NORMS,
    CONVOLUTIONS,
    Constants,
    arguments,
    epilogue_of,
    is_floating,
    is_getitem,
    numbers,
    op_of,
    sole_user,
    value_of,
)
from qkernels.nn.carry import FLOAT_DTYPES


@dataclass
class Unit:
    """One call of the conv op: `epilogue(conv(x) + bias + residual)`.

    Args:
        head: the node of the convolution, Linear or BatchNorm itself.
        x: what it reads.
        weight: as torch has it, float.
        bias: float [out], or None.
        stride, padding, dilation: of the conv op; padding may have twice as many entries.
        groups: of channels.
        transposed: whether it is a transposed convolution.
        linear: whether it is a Linear, whose features come last.
        residual: what is added before the epilogue, or None.
        epilogue: name of the function at the end.
        nodes: all nodes that it replaces, in order; the last one has its result.
    """

    head: fx.Node
    x: fx.Node
    weight: Tensor
    bias: Tensor | None
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int = 1
    transposed: bool = False
    linear: bool = False
    residual: fx.Node | None = None
    epilogue: str = "none"
    nodes: list[fx.Node] = field(default_factory=list)

    @property
    def result(self) -> fx.Node:
        """The node whose value this unit gives."""
        return self.nodes[-1]

    @property
    def is_norm(self) -> bool:
        """Whether it is a BatchNorm that follows no layer."""
        return op_of(self.head) in BATCH_NORMS

    @property
    def in_channels(self) -> int:
        """Channels of x."""
        return self.weight.shape[0 if self.transposed else 1] * (
            1 if self.transposed else self.groups
        )

    @property
    def out_channels(self) -> int:
        """Channels of the result."""
        return self.weight.shape[1] * self.groups if self.transposed else self.weight.shape[0]


def find_units(
    graph: fx.Graph, constants: Constants, why_left: Callable[[fx.Node], str | None]
) -> tuple[list[Unit], dict[fx.Node, str]]:
    """All layers of a graph that the conv op can compute, with what follows them fused in.

    Args:
        graph: it is not changed.
        constants: values of weights.
        why_left: says of a layer's node why it is to stay float, or None.

    Returns:
        The units in the order of their results, and reasons by node for the layers that are none.
    """
    taken: set[fx.Node] = set()
    units: list[Unit] = []
    reasons: dict[fx.Node, str] = {}
    # Backwards: of two convolutions that are added, the later one takes the sum, because the
    # other's result is there by then.
    for node in reversed(graph.nodes):
        op = op_of(node)
        if op in CONVOLUTIONS or op == "aten::linear":
            found = why_left(node) or _unit_of(node, constants)
            if isinstance(found, str):
                reasons[node] = found
                continue
            _fuse(found, constants, taken)
            units.append(found)
    for node in graph.nodes:
        if op_of(node) in BATCH_NORMS and node not in taken:
            found = why_left(node) or _norm_unit(node, constants)
            if isinstance(found, str):
                reasons[node] = found
                continue
            _fuse(found, constants, taken)
            units.append(found)
    order = {node: i for i, node in enumerate(graph.nodes)}
    return sorted(units, key=lambda unit: order[unit.result]), reasons


def _unit_of(node: fx.Node, constants: Constants) -> Unit | str:
    given = arguments(node)
    weight, bias = constants.value(given["weight"]), constants.value(given["bias"])
    reason = _why_no_weight(weight, given["bias"] is not None and bias is None)
    if reason is not None:
        return reason
    assert weight is not None
    x = given["input"]
    if not is_floating(x):
        return "its input is not a floating tensor"
    if op_of(node) == "aten::linear":
        if weight.dim() != 2:
            return "its weight is no matrix"
        unit = Unit(node, x, weight[..., None, None], bias, [1, 1], [0, 0], [1, 1], linear=True)
        return _why_too_long(unit) or _started(unit)
    dims, transposed = CONVOLUTIONS[op_of(node)]
    shape = value_of(x)
    if shape is None or shape.dim() != dims + 2:
        return "its input has no batch dimension"
    stride, dilation = numbers(given["stride"], dims), numbers(given["dilation"], dims)
    if stride is None or dilation is None:
        return "its stride or dilation depends on the input"
    padding = _padding(given, dims, dilation, tuple(weight.shape[2:]), transposed)
    if padding is None:
        return "its padding depends on the input"
    unit = Unit(node, x, weight, bias, stride, padding, dilation, given["groups"], transposed)
    return _why_too_long(unit) or _started(_with_pad(unit, dims))


def _started(unit: Unit) -> Unit:
    unit.nodes.append(unit.head)
    return unit


def _why_no_weight(weight: Tensor | None, bias_varies: bool) -> str | None:
    if weight is None or bias_varies:
        return "its weight or bias is computed from the model's inputs"
    if weight.is_meta:
        return "its weight is on the meta device and has no values"
    if weight.dtype not in FLOAT_DTYPES:
        return f"its weight is {weight.dtype}"
    if not weight.numel():
        return "its weight is empty"
    if not weight.isfinite().all():
        return "its weight holds NaN or Inf"
    return None


def _why_too_long(unit: Unit) -> str | None:
    columns = unit.in_channels // unit.groups * math.prod(unit.weight.shape[2:])
    limit = _C.LONGEST_CONV_SUM
    if columns > limit:
        return f"it sums {columns} products, which could overflow int32 (the limit is {limit})"
    return None


def _padding(
    given: dict[str, object],
    dims: int,
    dilation: list[int],
    kernel: tuple[int, ...],
    transposed: bool,
) -> list[int] | None:
    """Padding as the conv op takes it: in front, and then perhaps behind."""
    if given["padding"] == "valid":
        return [0] * dims
    if given["padding"] == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [t // 2 for t in total] + [t - t // 2 for t in total]
    padding = numbers(given["padding"], dims)
    if padding is None or not transposed:
        return padding
    extra = numbers(given["output_padding"], dims)
    if extra is None:
        return None
    return [*padding, *(p - e for p, e in zip(padding, extra, strict=True))]


def _with_pad(unit: Unit, dims: int) -> Unit:
    """Take zeros that are put around x before into the convolution's own padding."""
    pad = unit.x
    if op_of(pad) not in ("aten::pad", "aten::constant_pad_nd"):
        return unit
    given = arguments(pad)
    amounts = given["pad"]
    is_zeros = given.get("mode", "constant") == "constant" and not given["value"]
    simple = all(isinstance(amount, int) for amount in amounts) and len(amounts) <= 2 * dims
    if unit.transposed or not (is_zeros and simple and sole_user(pad) is unit.head):
        return unit
    front, behind = unit.padding[:dims], unit.padding[-dims:]
    for i in range(len(amounts) // 2):  # the last dimension comes first
        front[dims - 1 - i] += amounts[2 * i]
        behind[dims - 1 - i] += amounts[2 * i + 1]
    unit.padding = front + behind
    unit.x = given["self"]
    unit.nodes.append(pad)
    return unit


def _norm_unit(node: fx.Node, constants: Constants) -> Unit | str:
    """A BatchNorm that no layer takes in, as a depthwise convolution with a kernel of one."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    affine = _affine(node, constants)
    value = value_of(x)
    if isinstance(affine, str):
        return affine
    if value is None or value.dim() < 3:
        return "it follows no convolution or Linear, and its input has no spatial dimensions"
    factor, shift = affine
    dims = value.dim() - 2
    weight = factor.float().reshape(-1, 1, *[1] * dims)
    ones, zeros = [1] * dims, [0] * dims
    unit = Unit(node, x, weight, shift.float(), ones, zeros, ones, groups=len(factor))
    unit.nodes += [node, *_first_result(node)]
    return unit


def _affine(node: fx.Node, constants: Constants) -> tuple[Tensor, Tensor] | str:
    given = arguments(node)
    if given.get("training"):
        return "it is in training mode"
    keys = ("weight", "bias", "running_mean", "running_var")
    weight, bias, mean, var = (constants.value(given[key]) for key in keys)
    if mean is None or var is None or mean.is_meta:
        return "it has no running statistics"
    factor, shift = affine_of(mean, var, given["eps"], weight, bias)
    if not (factor.isfinite().all() and shift.isfinite().all()):
        return "its statistics hold NaN or Inf"
    return factor, shift


def _first_result(norm: fx.Node) -> list[fx.Node]:
    """The node that has a BatchNorm's output, if that is one of several results."""
    return [user for user in norm.users if is_getitem(user) and user.args[1] == 0]


def _fuse(unit: Unit, constants: Constants, taken: set[fx.Node]) -> None:
    """Take in what follows a layer and reads nothing else of it."""
    with torch.no_grad():
        _take_norm(unit, constants, taken)
    _take_residual(unit, taken)
    _take_epilogue(unit, taken)
    taken.update(unit.nodes)


def _take_norm(unit: Unit, constants: Constants, taken: set[fx.Node]) -> None:
    norm = sole_user(unit.result)
    if norm is None or op_of(norm) not in BATCH_NORMS or norm in taken:
        return
    value = value_of(unit.result)
    # Behind a Linear, channels are its features only if rows have no other dimension.
    if value is None or (unit.linear and value.dim() != 2) or norm.args[0] is not unit.result:
        return
    affine = _affine(norm, constants)
    if isinstance(affine, str):
        return
    groups = unit.groups if unit.transposed else None
    weight, bias = fold_tensors(unit.weight, unit.bias, *affine, transposed_groups=groups)
    weight, bias = weight.float(), bias.float()
    if not (weight.isfinite().all() and bias.isfinite().all()):
        return
    unit.weight, unit.bias = weight, bias
    unit.nodes += [norm, *_first_result(norm)]


def _take_residual(unit: Unit, taken: set[fx.Node]) -> None:
    add = sole_user(unit.result)
    if add is None or op_of(add) != "aten::add" or add in taken:
        return
    given = arguments(add)
    pair = (given["self"], given["other"])
    others = [node for node in pair if node is not unit.result]
    if given.get("alpha", 1) != 1 or len(others) != 1 or not is_floating(others[0]):
        return
    mine, other, total = (value_of(node) for node in (unit.result, others[0], add))
    assert mine is not None and other is not None and total is not None
    if mine.shape != other.shape or mine.dtype != other.dtype:
        return
    unit.residual = others[0]
    unit.nodes.append(add)


def _take_epilogue(unit: Unit, taken: set[fx.Node]) -> None:
    result = unit.result
    following = sole_user(result)
    if following is not None and following not in taken:
        name = epilogue_of(following)
        if name is not None and following.args[0] is result:
            unit.epilogue = name
            unit.nodes.append(following)
        return
    # silu written out: x * sigmoid(x)
    sigmoid = next((user for user in result.users if op_of(user) == "aten::sigmoid"), None)
    product = None if sigmoid is None else sole_user(sigmoid)
    if product is None or sigmoid is None or op_of(product) != "aten::mul":
        return
    if set(result.users) == {sigmoid, product} and not {sigmoid, product} & taken:
        unit.epilogue = "silu"
        unit.nodes += [sigmoid, product]
