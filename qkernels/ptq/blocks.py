"""Which layers run when, on which inputs, and what is enough to run them again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.report.outputs import Caller


@dataclass(frozen=True)
class Group:
    """Layers that get the same input, one right after the other.

    Args:
        layers: their qualified names.
        calls: how often they are called for each batch, all together.
        block: name of the module that is enough to run again for them; None for the whole model.
    """

    layers: tuple[str, ...]
    calls: tuple[int, ...]
    block: str | None


@dataclass
class Trace:
    """How a model runs on some batches.

    Args:
        groups: layers that ran, in order.
        before: by block, the block whose output is its input, everything else being the same.
    """

    groups: list[Group] = field(default_factory=list)
    before: dict[str, str] = field(default_factory=dict)


def find_blocks(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """Names of the modules to run one after the other: the children of lists that hold most layers.

    Args:
        model: looked through for `nn.ModuleList` and `nn.Sequential`.
        layers: names of the layers that matter.
    """
    names = list(layers)
    candidates = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        children = [f"{name}.{i}" if name else str(i) for i, _ in module.named_children()]
        counts = {c: sum(is_in(layer, c) for layer in names) for c in children}
        held = {c: count for c, count in counts.items() if count}
        # Every group of layers costs a run of its block, or of the whole model without one.
        saved = sum(count * (len(names) - count) for count in held.values())
        if len(held) > 1:
            candidates.append((saved, list(held)))
    chosen: list[str] = []
    for _, blocks in sorted(candidates, key=lambda c: -c[0]):
        if not any(is_in(a, b) or is_in(b, a) for a in blocks for b in chosen):
            chosen.extend(blocks)
    return chosen


def is_in(name: str, module: str) -> bool:
    """Whether a qualified name is that of a module or of something in it."""
    return name == module or name.startswith(f"{module}.")


def trace(
    model: nn.Module,
    batches: Sequence[Any],
    units: Sequence[tuple[str, ...]],
    call: Callable[[nn.Module, Any], Any] | None,
) -> Trace:
    """Run a model on all batches and note which layers ran, in which order, on which inputs.

    Args:
        model: in eval mode.
        batches: what it is called on.
        units: names of layers; several where layers share a weight and are quantized together.
        call: see `Caller`.
    """
    names = [name for unit in units for name in unit]
    recorder = _Recorder(model, names, find_blocks(model, names))
    caller = Caller(model, call)
    for batch in batches:
        with recorder:
            caller(batch)
    return recorder.result(units)


class _Recorder:
    """Hooks that note calls of layers and blocks; entered once for each batch."""

    def __init__(self, model: nn.Module, layers: list[str], blocks: list[str]) -> None:
        self._model = model
        self._layers = layers
        self._blocks = blocks
        self._hooks = ExitStack()
        # Of each batch: layer, whether its input is the one of the call before, block around it.
        self._events: list[list[tuple[str, bool, str | None]]] = []
        self._block_calls: list[dict[str, int]] = []
        self._unplain: set[str] = set()
        self._links: dict[str, set[str | None]] = {}

    def __enter__(self) -> None:
        self._events.append([])
        self._block_calls.append({})
        self._last_input: Tensor | None = None
        self._current: str | None = None
        self._done: tuple[str, tuple[Any, ...], dict[str, Any], Any] | None = None
        # A block that is itself a layer is entered before it is called as a layer.
        for name in self._blocks:
            module = self._model.get_submodule(name)
            handle = module.register_forward_pre_hook(
                lambda m, args, kwargs, n=name: self._enter(n, args, kwargs), with_kwargs=True
            )
            self._hooks.callback(handle.remove)
        for name in self._layers:
            module = self._model.get_submodule(name)
            handle = module.register_forward_pre_hook(
                lambda m, args, kwargs, n=name: self._call(n, args, kwargs), with_kwargs=True
            )
            self._hooks.callback(handle.remove)
        for name in self._blocks:
            module = self._model.get_submodule(name)
            handle = module.register_forward_hook(
                lambda m, args, kwargs, out, n=name: self._leave(n, args, kwargs, out),
                with_kwargs=True,
            )
            self._hooks.callback(handle.remove)

    def __exit__(self, *error: object) -> None:
        self._hooks.close()
        self._last_input = self._done = None

    def _call(self, name: str, args: Any, kwargs: Any) -> None:
        x = input_of(args, kwargs)
        # Compared with a tensor that is still alive, so that memory used again is no match.
        self._events[-1].append((name, x is self._last_input, self._current))
        self._last_input = x

    def _enter(self, name: str, args: Any, kwargs: Any) -> None:
        calls = self._block_calls[-1]
        calls[name] = calls.get(name, 0) + 1
        self._current = name
        if not (_is_plain(args) and _is_plain(kwargs)):
            self._unplain.add(name)
        self._links.setdefault(name, set()).add(self._block_before(args, kwargs))

    def _leave(self, name: str, args: Any, kwargs: Any, output: Any) -> None:
        self._current = None
        self._done = (name, args, kwargs, output)

    def _block_before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if self._done is None or not args:
            return None
        name, old_args, old_kwargs, output = self._done
        same = (
            args[0] is main_tensor(output)
            and _same(args[1:], old_args[1:])
            and _same(kwargs, old_kwargs)
        )
        return name if same else None

    def result(self, units: Sequence[tuple[str, ...]]) -> Trace:
        """What was noted, by groups in the order of their first call."""
        alone = {unit[0] for unit in units if len(unit) == 1}
        runs: dict[str, set[tuple[str, ...]]] = {}
        for events in self._events:
            for run in _runs(events, alone):
                for name in run:
                    runs.setdefault(name, set()).add(run)
        found = Trace()
        grouped: set[str] = set()
        for name in dict.fromkeys(event[0] for events in self._events for event in events):
            if name in grouped:
                continue
            members = next(iter(runs.get(name, {(name,)})))
            if any(runs.get(member) != {members} for member in members):
                members = (name,)
            if name not in alone:
                members = next(unit for unit in units if name in unit)
            grouped.update(members)
            found.groups.append(self._group(members))
        for block, before in self._links.items():
            (first, *others) = before
            if first is not None and not others:
                found.before[block] = first
        return found

    def _group(self, members: tuple[str, ...]) -> Group:
        events = [[e for e in events if e[0] in members] for events in self._events]
        blocks = {block for found in events for _, _, block in found}
        block = blocks.pop() if len(blocks) == 1 else None
        once = block is not None and all(calls.get(block) == 1 for calls in self._block_calls)
        if not once or block in self._unplain:
            block = None
        return Group(members, tuple(map(len, events)), block)


def _runs(events: list[tuple[str, bool, str | None]], alone: set[str]) -> Iterable[tuple[str, ...]]:
    """Names of consecutive calls with one input, of layers that are called once for the batch."""
    names = [name for name, _, _ in events]
    run: list[str] = []
    for name, same, _ in events:
        if run and not (same and run[-1] in alone):
            yield tuple(run)
            run = []
        if name in alone and names.count(name) == 1:
            run.append(name)
        elif run:
            yield tuple(run)
            run = []
    if run:
        yield tuple(run)


class Stop(BaseException):
    """Ends a run of the model once everything that was wanted has been seen.

    Not an Exception: a model may catch those.
    """


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input of a layer from the arguments of its call."""
    x = args[0] if args else kwargs["input"]
    assert isinstance(x, Tensor)
    return x


def main_tensor(output: Any) -> Any:
    """What a block hands on: its output, or the first element of a tuple."""
    return output[0] if isinstance(output, tuple | list) and output else output


def _is_plain(value: Any) -> bool:
    """Whether running a module on a value again cannot change it, as it would a cache."""
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, value.values()))
    kinds = (Tensor, bool, int, float, str, torch.dtype, torch.device)
    return value is None or isinstance(value, kinds)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(a == b)
