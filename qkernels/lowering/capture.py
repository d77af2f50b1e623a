"""A float model as a graph of ATen ops, by torch.export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from qkernels.lowering.signature import InputSpec, Signature


@dataclass
class Captured:
    """A model as a graph.

    Args:
        module: holds the graph, and the model's very parameters and buffers.
        signature: what it takes and returns.
    """

    module: fx.GraphModule
    signature: Signature


def arguments_of(example: Any, argument: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call, from a batch as `calibrate` takes it.

    Args:
        example: a tensor, a tuple or list of arguments, or a mapping of keyword arguments.
        argument: what it was given as, for errors.

    Raises:
        TypeError: something else.
    """
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, tuple | list):
        return tuple(example), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    raise TypeError(
        f"lower: {argument} is {type(example).__name__}; expected a tensor, a tuple of arguments, "
        "or a mapping of keyword arguments"
    )


def capture(model: nn.Module, example: Any, dynamic_shapes: Any) -> Captured:
    """Export a model, in eval mode, as a graph without changes in place.

    Args:
        model: the float model; it is not changed.
        example: one batch, for the shapes.
        dynamic_shapes: as `torch.export.export` takes it; None lets the first dimension of every
            tensor vary if the model allows it.

    Raises:
        ValueError: torch.export cannot capture the model.
    """
    from qkernels.report.outputs import evaluating

    args, kwargs = arguments_of(example, "example_inputs")
    if dynamic_shapes is None:
        args, kwargs = pytree.tree_map(_two_at_least, (args, kwargs))
        dynamic_shapes = _first_dimensions(model, args, kwargs)
    try:
        with evaluating(model), torch.no_grad():
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
            # Functional: no op changes its input. The empty table keeps convolutions whole.
            module = exported.run_decompositions({}).module()
    except Exception as error:
        raise ValueError(
            f"lower: torch.export cannot capture {type(model).__name__}: {error}\n"
            "Check that torch.export.export(model, example_inputs) works; quantize_ needs no graph"
        ) from error
    assert isinstance(module, fx.GraphModule)
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_module" and not node.users:
            graph.erase_node(node)  # torch's checks of the inputs; the lowered model has its own
    inputs = tuple(_input_spec(node) for node in graph.nodes if node.op == "placeholder")
    assert module._in_spec is not None and module._out_spec is not None
    signature = Signature(inputs, module._in_spec, module._out_spec)
    return Captured(module, signature)


def _two_at_least(value: Any) -> Any:
    """An example with two rows, because torch.export takes a size of one for a constant."""
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == 1:
        return torch.cat([value, value])
    return value


def _first_dimensions(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    import inspect

    def dims(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim():
            return {0: torch.export.Dim.AUTO}
        return None

    names = list(inspect.signature(model.forward).parameters)
    shapes = dict(zip(names, (pytree.tree_map(dims, arg) for arg in args), strict=False))
    shapes.update({name: pytree.tree_map(dims, value) for name, value in kwargs.items()})
    return shapes


def _input_spec(node: fx.Node) -> InputSpec | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    shape = tuple(size if isinstance(size, int) else None for size in value.shape)
    return InputSpec(str(node.target), shape, str(value.dtype).removeprefix("torch."))
