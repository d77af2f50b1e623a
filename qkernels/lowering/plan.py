"""Which values of a captured graph are int8 codes, and which ops work on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from qkernels.lowering.nodes import (
    arguments,
    epilogue_of,
    is_floating,
    is_getitem,
    is_unary,
    moves_numbers,
    numbers,
    op_of,
    sole_user,
    value_of,
)
from qkernels.lowering.units import Unit

# What a pooling op is on codes, and how many spatial dimensions it has.
POOLS = {
    f"aten::{kind}{dims}d": (kind, dims)
    for kind in ("max_pool", "avg_pool", "adaptive_avg_pool")
    for dims in (1, 2, 3)
}
NEAREST = "aten::upsample_nearest2d"
# Their result has the scale of their input.
PASSING = ("move", "max_pool", "nearest", "zeros")
# In integers also where a float result is wanted.
_WORTH_IT = ("avg_pool", "adaptive_avg_pool", "mean", "add")
_POOL_SIZES = ("kernel_size", "stride", "padding", "dilation", "output_size")


@dataclass
class Plan:
    """What becomes of each node.

    Args:
        units: convolutions and Linear layers that compute in integers, by result.
        kinds: of every other node that works on codes: "move", "max_pool", "avg_pool",
            "adaptive_avg_pool", "mean", "add", "concat", "unary", "nearest" or "zeros" (a border).
        inside: nodes that another one computes too, by that one: parts of units, and an
            activation function behind an addition.
        codes: nodes whose value exists as codes, because an integer op reads it.
        quantizer: the node whose range each of these shares.
    """

    units: dict[fx.Node, Unit]
    kinds: dict[fx.Node, str] = field(default_factory=dict)
    inside: dict[fx.Node, fx.Node] = field(default_factory=dict)
    codes: set[fx.Node] = field(default_factory=set)
    quantizer: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def gives_integers(self, node: fx.Node) -> bool:
        """Whether an integer op computes a node's value."""
        return node in self.units or node in self.kinds

    def float_readers(self) -> dict[fx.Node, int]:
        """How many units read each value that is not codes; they quantize it."""
        count: dict[fx.Node, int] = {}
        for unit in self.units.values():
            if unit.x not in self.codes:
                count[unit.x] = count.get(unit.x, 0) + 1
        return count

    def quantized(self) -> list[fx.Node]:
        """The nodes whose range is needed."""
        read = (*self.codes, *self.float_readers())
        return list(dict.fromkeys(self.quantizer.get(node, node) for node in read))


def make_plan(
    graph: fx.Graph, units: list[Unit], has_range: Callable[[fx.Node], bool]
) -> tuple[Plan, dict[fx.Node, str]]:
    """Decide about every node.

    Values that integer ops give may be codes; they are if an integer op reads them. Ops that only
    pass numbers on work on codes where what reads them does.

    Args:
        graph: it is not changed.
        units: candidates.
        has_range: whether the range of a node's value is, or can be, known.

    Returns:
        The plan, and by head the reasons for units that stay float.
    """
    reasons: dict[fx.Node, str] = {}
    plan = Plan({})
    can: set[fx.Node] = set()  # be codes, without being quantized first
    runs: dict[fx.Node, str] = {}  # in integers, if its inputs are codes
    sources: dict[fx.Node, list[fx.Node]] = {}
    candidates = {unit.result: unit for unit in units}
    parts = {node: unit for unit in units for node in unit.nodes[:-1]}
    for node in graph.nodes:
        unit = candidates.get(node)
        if unit is not None:
            reason = _why_no_unit(unit, can, has_range)
            if reason is None:
                plan.units[node] = unit
                plan.inside.update({part: node for part in unit.nodes[:-1]})
                sources[node] = [x for x in (unit.x, unit.residual) if x is not None and x in can]
                if has_range(node):
                    can.add(node)
            else:
                reasons[unit.head] = reason
            continue
        if node in parts or node in runs or node.op != "call_function":
            continue
        kind, inputs = integer_kind(node)
        if kind is None or not inputs or not all(x in can for x in inputs):
            continue
        result = _epilogue_node(node) if kind == "add" else None
        if result is not None and result not in candidates and result not in parts:
            plan.inside[node] = result  # the sum itself is never seen
            node = result
        runs[node], sources[node] = kind, inputs
        if kind in PASSING or has_range(node):
            can.add(node)
    _choose(graph, plan, runs, sources)
    _share_quantizers(graph, plan, sources)
    return plan, reasons


def _why_no_unit(unit: Unit, can: set[fx.Node], has_range: Callable[[fx.Node], bool]) -> str | None:
    if unit.is_norm and unit.x not in can:
        return "what feeds it is no convolution or Linear, and float"
    if unit.x not in can and not has_range(unit.x):
        return "the calibration has no range for its input; pass batches instead"
    return None


def _choose(
    graph: fx.Graph, plan: Plan, runs: dict[fx.Node, str], sources: dict[fx.Node, list[fx.Node]]
) -> None:
    """Backwards: an op that only passes numbers on works on codes if what reads it does."""
    for node in reversed(graph.nodes):
        if node in runs and (node in plan.codes or runs[node] in _WORTH_IT):
            plan.kinds[node] = runs[node]
        if plan.gives_integers(node):
            plan.codes.update(sources[node])
    for node in graph.nodes:  # the pieces of one tensor are all codes or all float
        if is_getitem(node) and node.args[0] in plan.kinds:
            plan.kinds[node] = "move"
            plan.codes.add(node)


def _share_quantizers(graph: fx.Graph, plan: Plan, sources: dict[fx.Node, list[fx.Node]]) -> None:
    """Which values share a range, so that codes pass on unchanged."""
    readers: dict[fx.Node, set[fx.Node]] = {}
    for node, read in sources.items():
        if plan.gives_integers(node):
            for source in read:
                readers.setdefault(source, set()).add(node)
    shared = plan.quantizer
    # What only a concatenation reads is rounded to its scale at once, and not twice.
    for node in reversed(graph.nodes):
        if plan.kinds.get(node) == "concat":
            for source in sources[node]:
                if readers[source] == {node} and plan.kinds.get(source) not in PASSING:
                    shared[source] = shared.get(node, node)
    for node in graph.nodes:
        passing = plan.kinds.get(node) in PASSING
        if passing:
            source = node.args[0] if is_getitem(node) else sources[node][0]
            assert isinstance(source, fx.Node)
            shared[node] = shared.get(source, source)


def integer_kind(node: fx.Node) -> tuple[str | None, list[fx.Node]]:
    """What a node would do to codes, or None, and which of its inputs would be codes.

    Args:
        node: of a captured graph.
    """
    op = op_of(node)
    if moves_numbers(node):
        return "move", [node.args[0]]  # type: ignore[list-item]
    if is_unary(node):
        return "unary", [node.args[0]]  # type: ignore[list-item]
    if not op or not is_floating(node):
        return None, []
    given = arguments(node)
    x: Any = given.get("self", given.get("input"))
    dims = getattr(value_of(x), "ndim", 0) - 2
    if op in POOLS:
        kind, pooled = POOLS[op]
        sizes = [v for k, v in given.items() if k in _POOL_SIZES]
        if dims == pooled and all(numbers(v, dims) is not None for v in sizes):
            return kind, [x]
    elif op == "aten::mean" and 1 <= dims <= 3 and given["dtype"] is None:
        reduced = {d % (dims + 2) for d in given["dim"] or ()}
        if reduced == set(range(2, dims + 2)):
            return "mean", [x]
    elif op == "aten::add" and given.get("alpha", 1) == 1:
        a, b = value_of(x), value_of(given["other"])
        if a is not None and b is not None and a.shape == b.shape and a.dtype == b.dtype:
            return "add", [x, given["other"]]
    elif op == "aten::cat":
        return "concat", list(given["tensors"])
    elif op == NEAREST and dims == 2:
        return "nearest", [x]
    elif op in ("aten::pad", "aten::constant_pad_nd") and not given["value"]:
        return "zeros", [x]
    return None, []


def _epilogue_node(add: fx.Node) -> fx.Node | None:
    """The activation function behind an addition, if it is all that reads the sum."""
    following = sole_user(add)
    if following is None or epilogue_of(following) is None or following.args[0] is not add:
        return None
    return following
