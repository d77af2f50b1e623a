"""The ranges of a captured graph's values: watched while batches run, or from a calibration."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import fx

from qkernels.calibration import Calibration, Int8Range, Observer
from qkernels.calibration.observers import finite_values
from qkernels.calibration.result import TensorRange
from qkernels.lowering.capture import Captured, arguments_of
from qkernels.lowering.nodes import is_floating, moves_numbers, op_of
from qkernels.lowering.plan import POOLS


class Ranges(Protocol):
    """Where ranges come from."""

    def has(self, node: fx.Node) -> bool:
        """Whether a range for a node's value is, or can be, known."""

    def find(self, nodes: Iterable[fx.Node], symmetric: bool) -> dict[fx.Node, Int8Range]:
        """The ranges of some nodes' values.

        Raises:
            ValueError: a value has none, because it never was a finite number.
        """


class WatchedRanges:
    """Ranges of every value that is asked for, by running the graph on batches.

    Args:
        captured: the model as a graph.
        batches: as `calibrate` takes them; read once.
        make: makes an observer for a value.
        progress: makes a progress bar out of batches, or passes them on.
    """

    def __init__(
        self,
        captured: Captured,
        batches: Iterable[Any],
        make: Callable[[], Observer],
        progress: Callable[[Iterable[Any]], AbstractContextManager[Iterable[Any]]] = nullcontext,
    ) -> None:
        self._captured = captured
        self._batches = batches
        self._make = make
        self._progress = progress

    def has(self, node: fx.Node) -> bool:
        return is_floating(node)

    @torch.no_grad()
    def find(self, nodes: Iterable[fx.Node], symmetric: bool) -> dict[fx.Node, Int8Range]:
        observers = {node: self._make() for node in nodes}
        count = 0
        watch = _Watching(self._captured.module, observers)
        with self._progress(self._batches) as batches:
            for batch in batches:
                watch.run(*_inputs(self._captured, batch))
                count += 1
        if not count:
            raise ValueError("lower: batches is empty; pass at least one batch")
        ranges = {}
        for node, observer in observers.items():
            try:
                low, high = observer.range(symmetric)
            except ValueError:
                raise ValueError(
                    f"lower: the value of {node.name} was never a finite number while the batches "
                    "ran; look for what makes NaN or Inf in the batches or in the model"
                ) from None
            ranges[node] = Int8Range.of(low, high, symmetric=symmetric)
        if watch.nonfinite:
            warnings.warn(
                f"lower: {watch.nonfinite} values were NaN or Inf while the batches ran, and are "
                "left out of the ranges; look for what makes them in the batches or in the model",
                stacklevel=3,
            )
        return ranges


class _Watching(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, observers: dict[fx.Node, Observer]) -> None:
        super().__init__(module)
        self._observers = observers
        self.nonfinite = 0

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        observer = self._observers.get(n)
        if observer is not None:
            values, nonfinite = finite_values(value)
            self.nonfinite += nonfinite
            observer.observe(values)
        return value


def _inputs(captured: Captured, batch: Any) -> list[Any]:
    """The graph's inputs for a batch; what the model was not exported with is left out."""
    args, kwargs = arguments_of(batch, "a batch")
    positional, keywords = captured.signature.counts
    args = args[:positional]
    if keywords:
        kwargs = {key: value for key, value in kwargs.items() if key in keywords}
    return captured.signature.flatten(args, kwargs)


class CalibratedRanges:
    """Ranges that `calibrate` found for modules: what a layer reads, and what a module gives.

    Args:
        graph: of the model.
        calibration: ranges by the names of modules.
        layer_of: the module that a node belongs to, by name.
    """

    def __init__(
        self, graph: fx.Graph, calibration: Calibration, layer_of: Callable[[fx.Node], str]
    ) -> None:
        self._calibration = calibration
        self._layer_of = layer_of
        last = {layer_of(node): node for node in graph.nodes if node.op == "call_function"}
        self._ends = {node: name for name, node in last.items()}

    def has(self, node: fx.Node) -> bool:
        return self._range(node) is not None

    def find(self, nodes: Iterable[fx.Node], symmetric: bool) -> dict[fx.Node, Int8Range]:
        found = {}
        for node in nodes:
            seen = self._range(node)
            assert seen is not None
            chosen = seen.symmetric if symmetric else seen.asymmetric
            assert chosen is not None
            found[node] = chosen
        return found

    def _range(self, node: fx.Node) -> TensorRange | None:
        """Of what reads a value, or of the module that ends with it."""
        if not is_floating(node):
            return None
        for reader in node.users:
            name = self._layer_of(reader)
            if reader.args[:1] == (node,) and name in self._calibration:
                found = self._calibration.input(name)
                if found.symmetric is not None:
                    return found
            elif moves_numbers(reader) or POOLS.get(op_of(reader), ("",))[0] == "max_pool":
                found_later = self._range(reader)
                if found_later is not None:
                    return found_later
        name = self._ends.get(node, "")
        if name in self._calibration:
            output = self._calibration.output(name)
            return output if output.symmetric is not None else None
        return None
