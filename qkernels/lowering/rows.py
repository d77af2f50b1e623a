"""The summary of a lowering: a row for each op of the float model."""

from __future__ import annotations

from torch import fx, nn

from qkernels.lowering.emit import Emitter
from qkernels.lowering.names import Names, kind_of, module_of
from qkernels.lowering.nodes import is_getitem, op_of, value_of
from qkernels.lowering.plan import Plan
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
    tensors: dict[str, object] = {}
    for node in module.graph.nodes:
        if node.op != "call_function" or is_getitem(node) or value_of_any(node) is None:
            continue
        before = 0
        for read in node.all_input_nodes:
            if read.op == "get_attr":
                value: object = module
                for part in str(read.target).split("."):
                    value = getattr(value, part)
                key = tensor_key(value)  # type: ignore[arg-type]
                if key not in seen:
                    seen.add(key)
                    before += value.nbytes  # type: ignore[attr-defined]
        became, note = _fate(node, plan, reasons, emitter)
        made = emitter.modules.get(emitter.name_of.get(node, ""))
        after = before if became is None else 0
        if node in plan.units:
            after = 0
        unit = next((u for u in plan.units.values() if u.head is node), None)
        if unit is not None:
            made = emitter.modules[emitter.name_of[unit.result]]
        elif node in plan.units:
            made = None
        if isinstance(made, nn.Module):
            after += own_bytes(made, seen_after)
        _, kind = module_of(node)
        name = names.of_node(node)
        shown = kind if name == module_of(node)[0] else kind_of(node)
        rows.append(ModuleRow(name, shown, became, note, before, after))
    del tensors
    return tuple(rows)


def value_of_any(node: fx.Node) -> object:
    """What a node gives, if that is a tensor or several."""
    value = node.meta.get("val")
    return value if value_of(node) is not None or isinstance(value, tuple | list) else None


def _fate(
    node: fx.Node, plan: Plan, reasons: dict[fx.Node, str], emitter: Emitter
) -> tuple[str | None, str]:
    result = plan.inside.get(node, node)
    unit = plan.units.get(result)
    if unit is not None:
        if node is unit.head:
            return ("int8 linear" if unit.linear else "int8 convolution"), _unit_note(unit)
        return f"part of {emitter.name_of[result]}", ""
    if node in plan.inside:
        return f"part of {emitter.name_of[result]}", ""
    if node in plan.kinds:
        return _BECAME[plan.kinds[node]], ""
    if node in reasons:
        return None, reasons[node]
    op = op_of(node)
    return None, f"{op.replace('aten::', 'aten.')} has no integer form here"


def _unit_note(unit: Unit) -> str:
    parts = [] if unit.epilogue == "none" else [unit.epilogue]
    if unit.residual is not None:
        parts.insert(0, "an addition")
    return f"with {' and '.join(parts)}" if parts else ""
