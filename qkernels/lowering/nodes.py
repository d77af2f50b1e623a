"""Questions about the nodes of a captured graph."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

# Ops that move numbers without changing them, so that they mean the same on codes. The tensor is
# their first argument.
COPYING = ("aten::alias", "aten::clone", "aten::contiguous", "aten::detach")
MOVING = frozenset(COPYING) | frozenset(
    f"aten::{name}"
    for name in (
        "channel_shuffle chunk expand flatten flip index_select movedim narrow permute "
        "pixel_shuffle pixel_unshuffle repeat reshape roll select slice split split_with_sizes "
        "squeeze t transpose unbind unflatten unsqueeze view _unsafe_view"
    ).split()
)
# Functions of one number, finite wherever their argument is.
UNARY = frozenset(
    f"aten::{name}"
    for name in (
        "abs celu clamp clamp_max clamp_min elu erf gelu hardsigmoid hardswish hardtanh leaky_relu "
        "mish neg relu relu6 selu sigmoid silu softplus softsign square tanh"
    ).split()
)
_WITH_NUMBER = frozenset(("aten::add", "aten::sub", "aten::mul", "aten::div"))
CONVOLUTIONS = {
    **{f"aten::conv{dims}d": (dims, False) for dims in (1, 2, 3)},
    **{f"aten::conv_transpose{dims}d": (dims, True) for dims in (1, 2, 3)},
}
BATCH_NORMS = ("aten::_native_batch_norm_legit_no_training", "aten::batch_norm")


def op_of(node: Any) -> str:
    """The name of the op that a node calls, "aten::relu", or nothing.

    Args:
        node: of a graph, or any other argument of a node.
    """
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return ""
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else str(schema.name)


def arguments(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by the names in the op's schema, defaults included.

    Args:
        node: calls an op of torch's.
    """
    found: dict[str, Any] = {}
    for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if i < len(node.args):
            found[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            found[argument.name] = node.kwargs[argument.name]
        else:
            found[argument.name] = argument.default_value
    return found


def value_of(node: Any) -> Tensor | None:
    """Shape and type of a node's result, or None if that is no tensor.

    Args:
        node: of a graph, or any other argument of a node.
    """
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def is_floating(node: Any) -> bool:
    """Whether a node gives a floating tensor."""
    value = value_of(node)
    return value is not None and value.is_floating_point()


def sole_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads another's result, or None if there are more or fewer."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def is_getitem(node: fx.Node) -> bool:
    """Whether a node takes one result of an op that gives several."""
    return node.op == "call_function" and node.target is operator.getitem


def moves_numbers(node: fx.Node) -> bool:
    """Whether a node gives numbers of its first argument, unchanged."""
    op = op_of(node)
    if op == "aten::pad":
        return bool(arguments(node)["mode"] != "constant")
    if is_getitem(node):
        return moves_numbers(node.args[0])  # type: ignore[arg-type]
    return op in MOVING


def is_unary(node: fx.Node) -> bool:
    """Whether a node is a function of one number, applied to each element of one tensor."""
    op, tensors = op_of(node), node.all_input_nodes
    if len(tensors) != 1 or node.args[:1] != (tensors[0],) or not is_floating(tensors[0]):
        return False
    if op in _WITH_NUMBER:
        other = arguments(node)["other"]
        return isinstance(other, int | float) and not (op == "aten::div" and other == 0)
    return op in UNARY


def epilogue_of(node: fx.Node) -> str | None:
    """The name of the kernels' epilogue that a node computes, or None."""
    op = op_of(node)
    if op in ("aten::relu", "aten::relu6", "aten::hardswish", "aten::silu"):
        return op.removeprefix("aten::")
    if op in ("aten::hardtanh", "aten::clamp"):
        given = arguments(node)
        ends = [given.get(key) for key in ("min_val", "max_val")]
        if op == "aten::clamp":
            ends = [given["min"], given["max"]]
        known: dict[tuple[Any, Any], str] = {(0, 6): "relu6", (0, None): "relu"}
        return known.get((ends[0], ends[1]))
    if op == "aten::gelu":
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(arguments(node)["approximate"])
    return None


def numbers(value: Any, dims: int) -> list[int] | None:
    """An integer or list as a list with an entry for each dimension; None if sizes are unknown.

    Args:
        value: an argument of an op.
        dims: how many entries it stands for.
    """
    listed = list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(entry, int) for entry in listed):
        return None
    return listed * dims if len(listed) == 1 else listed


def stored(module: fx.GraphModule, node: fx.Node) -> Any:
    """What a `get_attr` node reads.

    Args:
        module: holds the graph and its tensors.
        node: the node.
    """
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


class Constants:
    """The values of what does not depend on a model's inputs.

    Args:
        module: holds the graph and its tensors.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self._module = module
        self._known: dict[fx.Node, Any] = {}

    def value(self, node: Any) -> Tensor | None:
        """A tensor, if a node's result is always the same.

        Args:
            node: of the graph, or any other argument of a node.
        """
        return found if isinstance(found := self._value(node), Tensor) else None

    def _value(self, node: Any) -> Any:
        if not isinstance(node, fx.Node):
            return None
        if node not in self._known:
            self._known[node] = self._compute(node)
        return self._known[node]

    @torch.no_grad()
    def _compute(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return stored(self._module, node)
        inputs = node.all_input_nodes
        if not op_of(node).startswith("aten::") and not is_getitem(node):
            return None
        if not inputs or any(self._value(found) is None for found in inputs):
            return None
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            return None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._value)
        return node.target(*args, **kwargs)  # type: ignore[operator]
