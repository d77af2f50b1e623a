"""Convolutions that follow each other in a lowered graph, run by one op instead of one each."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from qkernels.nn.int8 import Int8Conv

_SEQUENCE = torch.ops.qkernels.conv_sequence.default


def join_convolutions(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> None:
    """Replace calls of convolutions that follow each other by calls of `run_convolutions`.

    Args:
        graph: calls `modules`; it is changed.
        modules: by name.
    """
    for run in list(_runs(graph, modules)):
        inputs = list({x: None for node in run for x in node.all_input_nodes if x not in run})
        number = {node: i for i, node in enumerate([*inputs, *run])}
        wiring: list[int] = []
        settings: list[int] = []
        layers = []
        for node in run:
            x, residual = (*node.args, None)[:2]
            wiring += [number[x], -1 if residual is None else number[residual]]  # type: ignore[index]
            layer = modules[str(node.target)]
            assert isinstance(layer, Int8Conv)
            settings += layer.op_settings
            with graph.inserting_before(run[0]):
                layers.append(graph.get_attr(str(node.target)))
        readers = {node: [user for user in node.users if user not in run] for node in run}
        outputs = [node for node in run if readers[node]]
        places = [number[node] for node in outputs]
        # Tuples of numbers are constants in the code, and cost nothing under torch.compile.
        args = (tuple(layers), tuple(inputs), tuple(wiring), tuple(settings), tuple(places))
        after = run[-1].next
        with graph.inserting_before(after):
            results = graph.call_function(run_convolutions, args)
            for i, node in enumerate(outputs):
                result = graph.call_function(operator.getitem, (results, i))
                for user in readers[node]:
                    user.replace_input_with(node, result)
        for node in reversed(run):
            graph.erase_node(node)


def _runs(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> Iterator[list[fx.Node]]:
    """Convolutions from codes or float to codes, two or more in a row, of one layout."""
    run: list[fx.Node] = []
    scheme = None
    for node in graph.nodes:
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        conv = layer if isinstance(layer, Int8Conv) and layer.joins and not node.kwargs else None
        if run and (conv is None or conv.scheme != scheme):
            if len(run) > 1:
                yield run
            run = []
        if conv is not None:
            run.append(node)
            scheme = conv.scheme


def run_convolutions(
    layers: Sequence[Int8Conv],
    inputs: Sequence[Tensor],
    wiring: Sequence[int],
    settings: Sequence[int],
    outputs: Sequence[int],
) -> Sequence[Tensor]:
    """Results of convolutions that read each other's results.

    Args:
        layers: whose results are codes, in order.
        inputs: what they read besides.
        wiring: for each layer its x and its residual, as places in `inputs` followed by the
            results of the layers; -1 for no residual.
        settings: `op_settings` of the layers, one behind the other.
        outputs: the places of what is returned.
    """
    # A layer by itself runs its hooks, follows autocast, and says its name in an error.
    if not any(layer.has_hooks for layer in layers) and not _casts(inputs[0]):
        constants: list[Tensor | None] = []
        for layer in layers:
            constants += layer.op_tensors
        try:
            results: list[Tensor] = _SEQUENCE(
                inputs, constants, layers[0].layout, wiring, settings, outputs
            )
            return results
        except RuntimeError:
            pass
    values = list(inputs)
    for i, layer in enumerate(layers):
        read = [values[place] for place in wiring[2 * i : 2 * i + 2] if place >= 0]
        values.append(layer(*read))
    return [values[i] for i in outputs]


def _casts(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)
