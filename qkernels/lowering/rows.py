"""The summary of a lowering: a row for each op of the float model."""

from __future__ import annotations

from torch import Tensor, fx

from qkernels.lowering.emit import Emitter
from qkernels.lowering.names import Names, kind_of, module_of
from qkernels.lowering.nodes import is_getitem, op_of, stored
from qkernels.lowering.plan import Plan, integer_kind
from qkernels.lowering.units import Unit
from qkernels.plan import own_bytes, tensor_key
from qkernels.summary import ModuleRow

_BECAME = {
    "move": "passed on as int8",
    "max_pool": "int8 max pooling",
    "avg_pool": "int8 average pooling",
    "adaptive_avg_pool": "int8 average pooling",
    "mean": "int8 average pooling",
    "add": "int8 addition",
    "concat": "int8 concatenation",
    "unary": "int8 lookup table",
    "nearest": "int8 upsampling",
    "zeros": "int8 border",
}


def summary_rows(
    module: fx.GraphModule, plan: Plan, reasons: dict[fx.Node, str], emitter: Emitter, names: Names
) -> tuple[ModuleRow, ...]:
    """What became of every op.

    Args:
        module: the captured model.
        plan: the decisions.
        reasons: why layers stayed float, by node.
        emitter: after it has run.
        names: what nodes go by.
    """
    rows = []
    seen: set[object] = set()
    seen_after: set[object] = set()
    unit_of = {unit.head: unit for unit in plan.units.values()}
    for node in module.graph.nodes:
        gives_tensors = isinstance(node.meta.get("val"), Tensor | tuple | list)
        if node.op != "call_function" or is_getitem(node) or not gives_tensors:
            continue
        before = _bytes_read(module, node, seen)
        became, note = _fate(node, plan, reasons, emitter)
        # A unit's bytes stand in the row of its layer.
        result = unit_of[node].result if node in unit_of else node
        after = before if became is None else 0
        if result in emitter.name_of and (node in unit_of or node not in plan.units):
            after += own_bytes(emitter.modules[emitter.name_of[result]], seen_after)
        name, (module_name, kind) = names.of_node(node), module_of(node)
        shown = kind if name == module_name else kind_of(node)
        rows.append(ModuleRow(name, shown, became, note, before, after))
    return tuple(rows)


def _bytes_read(module: fx.GraphModule, node: fx.Node, seen: set[object]) -> int:
    """Bytes of the model's tensors that a node reads and none before it did."""
    total = 0
    for read in node.all_input_nodes:
        value = stored(module, read) if read.op == "get_attr" else None
        if value is not None and tensor_key(value) not in seen:
            seen.add(tensor_key(value))
            total += value.nbytes
    return total


def _fate(
    node: fx.Node, plan: Plan, reasons: dict[fx.Node, str], emitter: Emitter
) -> tuple[str | None, str]:
    """What a node became, or None, and what there is to say about it."""
    result = plan.inside.get(node, node)
    unit = plan.units.get(result)
    if unit is not None and node is unit.head:
        return ("int8 linear" if unit.linear else "int8 convolution"), _unit_note(unit)
    if unit is not None or node in plan.inside:
        return f"part of {emitter.name_of[result]}", ""
    if node in plan.kinds:
        return _BECAME[plan.kinds[node]], ""
    if node in reasons:
        return None, reasons[node]
    kind, inputs = integer_kind(node)
    if kind is None:
        return None, f"{op_of(node).replace('::', '.')} has no integer form here"
    if all(plan.gives_integers(x) for x in inputs):
        return None, "what reads it is float"
    return None, "what it reads is float"


def _unit_note(unit: Unit) -> str:
    parts = [] if unit.epilogue == "none" else [unit.epilogue]
    if unit.residual is not None:
        parts.insert(0, "an addition")
    return f"with {' and '.join(parts)}" if parts else ""
