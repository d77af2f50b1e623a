"""Trying a model with other layers without changing it, and the time that its layers take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from qkernels.timing import clock


@contextmanager
def standing_in(pairs: Iterable[tuple[nn.Module, nn.Module]]) -> Iterator[None]:
    """Let modules compute what others would, for a while.

    Structure, names and hooks stay, also where a parent holds a module under several names.

    Args:
        pairs: a module and the one whose forward runs in its place.
    """
    changed = []
    try:
        for module, other in pairs:
            changed.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = other.forward
        yield
    finally:
        for module, forward in changed:
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward


class LayerClock:
    """The time that layers take while their model runs, so with caches as they are there.

    Args:
        layers: modules by name.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = layers

    @contextmanager
    def running(self) -> Iterator[dict[str, float]]:
        """Seconds by layer, summed over its calls in the enclosed run; layers that ran alone."""
        seconds: dict[str, float] = {}
        started: dict[str, float] = {}

        def before(name: str) -> Any:
            def hook(_module: nn.Module, _args: Any) -> None:
                started[name] = clock()

            return hook

        def after(name: str) -> Any:
            def hook(_module: nn.Module, _args: Any, _output: Any) -> None:
                seconds[name] = seconds.get(name, 0.0) + clock() - started.pop(name)

            return hook

        handles = []
        for name, module in self._layers.items():
            # Other hooks stay outside: they are no part of the layer.
            handles.append(module.register_forward_pre_hook(before(name)))
            handles.append(module.register_forward_hook(after(name), prepend=True))
        try:
            yield seconds
        finally:
            for handle in handles:
                handle.remove()
