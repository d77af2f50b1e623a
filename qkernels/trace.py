"""Which layer feeds which, as far as torch.fx can tell."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx
from torch import nn


class Connections:
    """The calls of a model's layers, traced symbolically.

    Where the whole model cannot be traced, the largest parts that can are. A part is traced
    with the optional arguments of its forward given and again with them left out; what is said
    about a layer holds in both cases.

    Args:
        model: any module. Tracing runs its Python code on stand-ins for tensors; what that leaves
            in attributes is taken back.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parts = _traced_parts(model)

    def feeder(self, name: str) -> tuple[str, None] | tuple[None, str]:
        """The module whose output a module takes, if nothing else takes that; or why there is none.

        Args:
            name: qualified name of a module that is called with one tensor.

        Returns:
            (name of the feeding module, None), or (None, reason).
        """
        found: set[str] = set()
        prefix, graphs = self._part_that_calls(name)
        for graph in graphs:
            layer, reason = _feeder(graph, _inside(name, prefix))
            if reason is not None:
                return None, reason
            found.add(f"{prefix}.{layer}" if prefix else str(layer))
        if not found:
            return None, "the code around it cannot be traced; name it in pairs"
        if len(found) > 1:
            return None, f"what feeds it depends on how the model is called: {sorted(found)}"
        return found.pop(), None

    def _part_that_calls(self, name: str) -> tuple[str, list[torch.fx.Graph]]:
        """The largest one; if none calls the module, the largest that holds it."""
        holding = [prefix for prefix in self._parts if _is_below(name, prefix)]
        holding.sort(key=len)
        for prefix in holding:
            if any(_calls(graph, _inside(name, prefix)) for graph in self._parts[prefix]):
                return prefix, self._parts[prefix]
        return (holding[0], self._parts[holding[0]]) if holding else ("", [])


def _feeder(graph: torch.fx.Graph, name: str) -> tuple[str, None] | tuple[None, str]:
    calls = _calls(graph, name)
    if not calls:
        return None, "no code that can be traced calls it"
    if len(calls) != 1:
        return None, f"it runs {len(calls)} times in a call of the model, instead of once"
    source = calls[0].args[0] if calls[0].args else calls[0].kwargs.get("input")
    if not isinstance(source, torch.fx.Node) or source.op != "call_module":
        return None, "its input does not come straight from a layer"
    layer = str(source.target)
    if len(_calls(graph, layer)) != 1:
        return None, f"{layer}, which feeds it, runs more than once in a call of the model"
    if len(source.users) != 1:
        return None, f"the output of {layer}, which feeds it, is used elsewhere too"
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target).startswith((f"{layer}.", f"{name}.")):
            return None, f"the code around it reads {node.target} directly"
    return layer, None


def _calls(graph: torch.fx.Graph, name: str) -> list[torch.fx.Node]:
    return [node for node in graph.nodes if node.op == "call_module" and node.target == name]


def _is_below(name: str, prefix: str) -> bool:
    return not prefix or name.startswith(f"{prefix}.")


def _inside(name: str, prefix: str) -> str:
    return name[len(prefix) + 1 :] if prefix else name


def _traced_parts(model: nn.Module) -> dict[str, list[torch.fx.Graph]]:
    """Graphs of the model, or else of all parts that can be traced, by qualified name."""
    whole = _trace(model, frozenset())
    if whole:
        return {"": whole}
    parts: dict[str, list[torch.fx.Graph]] = {}
    opaque: set[int] = set()
    for name, module in reversed(list(model.named_modules())):  # children come before parents
        if next(module.children(), None) is None:
            continue
        graphs = _trace(module, frozenset(opaque))
        if graphs:
            parts[name] = graphs
        else:
            opaque.add(id(module))
    return parts


def _trace(module: nn.Module, opaque: frozenset[int]) -> list[torch.fx.Graph]:
    graphs = []
    parameters = inspect.signature(module.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    for concrete in [None, defaults] if defaults else [None]:
        try:
            with _attributes_kept(module), torch.random.fork_rng(devices=[]):
                graphs.append(_Tracer(opaque).trace(module, concrete))
        except Exception:  # anything can happen in code that was not written for stand-ins
            continue
    return graphs


class _Tracer(torch.fx.Tracer):
    # Otherwise an in-place operation on a buffer would really happen.
    proxy_buffer_attributes = True

    def __init__(self, opaque: frozenset[int]) -> None:
        super().__init__()
        self._opaque = opaque

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        childless = next(m.children(), None) is None
        return (
            childless or id(m) in self._opaque or super().is_leaf_module(m, module_qualified_name)
        )


@contextmanager
def _attributes_kept(module: nn.Module) -> Iterator[None]:
    """Take back what code does to the attributes of modules."""
    tables = ("_parameters", "_buffers", "_modules")
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for each in module.modules():
        kept.append((each.__dict__, dict(each.__dict__)))
        kept.extend((each.__dict__[table], dict(each.__dict__[table])) for table in tables)
    try:
        yield
    finally:
        for own, before in kept:
            own.clear()
            own.update(before)
