"""Calls of quantized layers and of what stands between them, put together as one op."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from qkernels.lowering.nodes import is_getitem, op_of, value_of
from qkernels.ops_sequence import OPS, signature

_NUMBERS = {f"qkernels::{name}": i for i, name in enumerate(OPS)}
_SEQUENCE = torch.ops.qkernels.op_sequence.default


def join_calls(graph: fx.Graph) -> int:
    """Replace calls that follow each other by one call of `op_sequence`.

    Args:
        graph: as `qkernels.compiler.rewrite` takes it; it is changed.

    Returns:
        How many such calls there are now.
    """
    runs = [run for run in _runs(graph) if len(run.calls) > 1]
    for run in runs:
        run.replace(graph)
    return len(runs)


class _Run:
    """Calls that can be made in one go, and what has to come after them."""

    def __init__(self) -> None:
        self.calls: list[fx.Node] = []
        self.nodes: dict[fx.Node, None] = {}  # the calls, and the items taken of their results
        self.readers: dict[fx.Node, None] = {}  # of the calls' results, directly or not
        self.moved: list[fx.Node] = []  # those that stand before the last of `nodes`

    def add(self, node: fx.Node) -> None:
        if not is_getitem(node):
            self.calls.append(node)
        self.nodes[node] = None
        self.moved = list(self.readers)

    def replace(self, graph: fx.Graph) -> None:
        inputs = dict.fromkeys(
            x for call in self.calls for x in call.all_input_nodes if x not in self.nodes
        )
        program = _Program(list(inputs))
        for call in self.calls:
            program.add(call)
        outputs: dict[int, list[fx.Node]] = {}
        for node in self.nodes:
            if node in program.value and any(user not in self.nodes for user in node.users):
                outputs.setdefault(program.value[node], []).append(node)
        places = sorted(outputs)
        program.note_last_readers(places)
        last = list(self.nodes)[-1]
        with graph.inserting_after(last):
            together = graph.call_function(
                _SEQUENCE, (list(inputs), program.numbers, program.factors, places)
            )
        place = together
        for i, value in enumerate(places):
            with graph.inserting_after(place):
                place = graph.call_function(operator.getitem, (together, i))
            for node in outputs[value]:
                place.meta.update(node.meta)
                node.replace_all_uses_with(place)
        for node in self.moved:
            place.append(node)
            place = node
        for node in reversed(self.nodes):
            graph.erase_node(node)


class _Program:
    """What `op_sequence` takes, and the numbers of its values by their nodes.

    Args:
        inputs: the first values.
    """

    def __init__(self, inputs: list[fx.Node]) -> None:
        self.value = {node: i for i, node in enumerate(inputs)}
        self.count = len(inputs)
        self.numbers: list[int] = []
        self.factors: list[float] = []
        self._read: dict[int, int] = {}  # value → where in `numbers` it is read last

    def add(self, call: fx.Node) -> None:
        name = op_of(call)
        self.numbers.append(_NUMBERS[name])
        lists = [x for x in call.args if isinstance(x, list | tuple)]
        if lists:
            self.numbers.append(len(lists[0]))
        for kind, argument in zip(signature(OPS[_NUMBERS[name]]), call.args, strict=True):
            for item in argument if kind.startswith("List") else [argument]:  # type: ignore[union-attr]
                self._add_one(kind, item)
        if isinstance(call.meta["val"], torch.Tensor):
            self.value[call] = self.count
            self.count += 1
        else:
            for user in call.users:
                self.value[user] = self.count + int(user.args[1])  # type: ignore[arg-type]
            self.count += len(call.meta["val"])

    def _add_one(self, kind: str, item: Any) -> None:
        if kind == "float":
            self.factors.append(item)
        elif "Tensor" not in kind:
            self.numbers.append(int(item))
        elif item is None:
            self.numbers.append(-1)
        else:
            self._read[self.value[item]] = len(self.numbers)
            self.numbers.append(2 * self.value[item])

    def note_last_readers(self, kept: list[int]) -> None:
        """Mark where values are read for the last time.

        Args:
            kept: those that are results.
        """
        for value, place in self._read.items():
            if value not in kept:
                self.numbers[place] += 1


def _runs(graph: fx.Graph) -> Iterator[_Run]:
    run = _Run()
    for node in graph.nodes:
        reads = any(x in run.readers for x in node.all_input_nodes)
        if _joins(node):
            if reads:
                yield run
                run = _Run()
            run.add(node)
        elif is_getitem(node) and node.args[0] in run.nodes:
            run.add(node)
        elif _writes(node):
            yield run
            run = _Run()
        elif reads or any(x in run.nodes for x in node.all_input_nodes):
            run.readers[node] = None
    yield run


def _joins(node: fx.Node) -> bool:
    """Whether a node calls one of the ops on a CPU, with numbers that are known."""
    if op_of(node) not in _NUMBERS or node.kwargs or "val" not in node.meta:
        return False
    x = value_of(node.args[0])
    if x is None or x.device.type != "cpu":
        return False
    kinds = signature(OPS[_NUMBERS[op_of(node)]])
    if not isinstance(node.meta["val"], torch.Tensor) and not all(map(is_getitem, node.users)):
        return False
    return len(node.args) == len(kinds) and all(
        isinstance(item, int | float) or "Tensor" in kind
        for kind, argument in zip(kinds, node.args, strict=True)
        for item in (argument if kind.startswith("List") else [argument])  # type: ignore[union-attr]
    )


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "output" or (schema is not None and schema.is_mutable)
