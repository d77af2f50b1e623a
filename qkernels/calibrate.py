"""calibrate: run a float model on example data and note which ranges its layers use."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.attention import attention_split
from qkernels.calibration import OBSERVERS, Calibration, Int8Range, LayerRanges, Observer
from qkernels.calibration.observers import finite_values
from qkernels.calibration.result import TensorRange
from qkernels.nn import QModule
from qkernels.nn.fastpath import plain_transformer_paths
from qkernels.plan import check_model, check_patterns, matches

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    observer: str | Callable[[], Observer] = "mse",
    *,
    modules: str | Sequence[str] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress: bool | None = None,
) -> Calibration:
    """Run batches through a float model and choose int8 ranges for its layers' inputs and outputs.

    The model runs in eval mode and without gradients; afterwards every module has its own mode
    again, also when something fails. Batches are read once, and memory does not grow with them.
    Values that are NaN or Inf are left out of the ranges and counted; a warning says so.

    Args:
        model: float model on the CPU, not compiled.
        batches: tensors, tuples or lists (positional arguments) or mappings (keyword arguments).
            What the model's `forward` has no parameter for, such as labels, is not passed to it.
        observer: what chooses a range: "minmax", "moving_average", "percentile", "mse" or
            "histogram"; or anything that makes an observer when called, one for each tensor:
            `lambda: qk.calibration.PercentileObserver(99.9)`.
        modules: patterns of the modules to watch, as in `quantize_`; of what they name, modules
            without children are watched. By default Linear, convolutions and transposed ones.
        forward: `forward(model, batch)` for models that are called in another way.
        progress: show a progress bar; by default on a terminal.

    Returns:
        The ranges, for `quantize_(model, qk.W8A8(static=True), calibration=...)`. Print it, or
        save it with `save_json`.

    Raises:
        TypeError: an argument of another type, or a batch of a kind that is not understood.
        ValueError: an unknown observer, nothing to watch, no batches, or no watched module ran.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> calibration = qk.calibrate(model, [torch.randn(16, 64) for _ in range(4)])
        >>> calibration.input("2").min
        0.0
        >>> summary = qk.quantize_(model, qk.W8A8(static=True), calibration=calibration)
        >>> model[2].x_scale.item() == calibration.input("2").symmetric.scale
        True
    """
    # Imported here because it is not needed by programs that only run quantized models.
    from qkernels.report.outputs import Caller, evaluating

    make = observer_factory(observer)
    _check(model, batches, forward)
    call = Caller(model, forward, op="calibrate", argument="forward")
    count = 0
    with ExitStack() as stack:
        stack.enter_context(attention_split(model))
        records = {name: _Record(name, module, make) for name, module in _watched(model, modules)}
        # Not inference_mode: a model that keeps tensors for later could not train with them.
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(model))
        stack.enter_context(plain_transformer_paths())
        for record in records.values():
            stack.enter_context(record.watching())
        for batch in stack.enter_context(progress_bar(batches, progress)):
            call(batch)
            count += 1
    if count == 0:
        raise ValueError("calibrate: batches is empty; pass at least one batch")
    if not any(record.calls for record in records.values()):
        raise ValueError(
            f"calibrate: none of the {len(records)} watched modules ran ({_some(list(records))}); "
            "pass forward=lambda model, batch: ... that runs them"
        )
    named = observer if isinstance(observer, str) else repr(make())
    layers = tuple(record.ranges() for record in records.values())
    result = Calibration(type(model).__name__, named, count, layers)
    _warn_of_nonfinite(result)
    return result


def observer_factory(observer: object, op: str = "calibrate") -> Callable[[], Observer]:
    """Something that makes an observer, from what a user gave.

    Args:
        observer: the name of one, or something that makes one.
        op: the function that it was given to, for errors.

    Raises:
        ValueError: an unknown name.
        TypeError: something else.
    """
    names = ", ".join(map(repr, OBSERVERS))
    if isinstance(observer, str):
        if observer not in OBSERVERS:
            raise ValueError(
                f"{op}: observer is {observer!r}; expected one of {names}, or something that makes "
                "an observer"
            )
        return OBSERVERS[observer]
    made = observer() if callable(observer) else None
    if not callable(observer) or not (hasattr(made, "observe") and hasattr(made, "range")):
        raise TypeError(
            f"{op}: observer is {observer!r}; expected a name ({names}), or something that makes a "
            "new observer when called, such as lambda: qk.calibration.PercentileObserver(99.9)"
        )
    return observer


def _check(model: object, batches: object, forward: object) -> None:
    check_model(model, "calibrate")
    assert isinstance(model, nn.Module)
    if hasattr(model, "_orig_mod") or model._compiled_call_impl is not None:
        raise ValueError(
            "calibrate: the model is compiled, so its layers cannot be watched; calibrate the "
            "model that was given to torch.compile"
        )
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(
            "calibrate: batches must be an iterable of batches, got one "
            f"{type(batches).__name__}; pass [batch]"
        )
    if forward is not None and not callable(forward):
        raise TypeError(
            f"calibrate: forward is {forward!r}; expected a function of the model and a batch"
        )


def _watched(
    model: nn.Module, patterns: str | Sequence[str] | None
) -> Iterator[tuple[str, nn.Module]]:
    if patterns is None:
        found = [(name, m) for name, m in model.named_modules() if isinstance(m, _LAYERS)]
        wanted = "Linear or convolution"
    else:
        chosen = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        if not all(isinstance(pattern, str) for pattern in chosen):
            raise TypeError(f"calibrate: modules is {patterns!r}; expected patterns of names")
        check_patterns(model, chosen, "modules", op="calibrate")
        found = [
            (name, module)
            for name, module in model.named_modules()
            if next(module.children(), None) is None and any(matches(p, name) for p in chosen)
        ]
        wanted = f"module without children that {patterns!r} names"
    if not found:
        quantized = any(isinstance(module, QModule) for module in model.modules())
        hint = "; it is quantized already: calibrate the float model" if quantized else ""
        raise ValueError(f"calibrate: {type(model).__name__} holds no {wanted}{hint}")
    yield from found


def channel_dim(module: nn.Module) -> int | None:
    """Which dimension of a layer's input and output holds its channels; None if none does.

    Args:
        module: a float layer.
    """
    if isinstance(module, nn.Linear):
        return -1
    if isinstance(module, nn.modules.conv._ConvNd):
        return -1 - len(module.kernel_size)
    return None


@dataclass
class _Tensors:
    """What accumulates about one side of a layer."""

    observer: Observer
    channel_dim: int | None
    count: int = 0
    nonfinite: int = 0
    low: float = float("inf")
    high: float = float("-inf")
    channel_amax: Tensor | None = None
    channels_differ: bool = False

    def add(self, x: Tensor) -> None:
        self.count += x.numel()
        values, nonfinite = finite_values(x)
        self.nonfinite += nonfinite
        if not values.numel():
            return
        low, high = torch.aminmax(values)
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        self.observer.observe(values)
        if self.channel_dim is not None and x.dim() >= -self.channel_dim:
            self._add_channels(x.detach().float(), self.channel_dim, clean=nonfinite == 0)

    def _add_channels(self, x: Tensor, dim: int, clean: bool) -> None:
        rows = x.movedim(dim, 0).reshape(x.shape[dim], -1)
        amax = (rows if clean else rows.nan_to_num(0, 0, 0)).abs().amax(1)
        if self.channel_amax is None:
            self.channel_amax = amax
        elif self.channel_amax.shape == amax.shape:
            self.channel_amax = torch.maximum(self.channel_amax, amax)
        else:
            self.channels_differ = True

    def range(self) -> TensorRange:
        if self.low > self.high:
            return TensorRange(0.0, 0.0, self.count, self.nonfinite, None, None, None)
        symmetric, asymmetric = (
            Int8Range.of(*self.observer.range(symmetric), symmetric=symmetric)
            for symmetric in (True, False)
        )
        amax = None if self.channels_differ else self.channel_amax
        return TensorRange(
            min=self.low,
            max=self.high,
            count=self.count,
            nonfinite=self.nonfinite,
            symmetric=symmetric,
            asymmetric=asymmetric,
            channel_amax=None if amax is None else tuple(amax.tolist()),
        )


class _Record:
    """What accumulates about one module while batches pass by."""

    def __init__(self, name: str, module: nn.Module, make: Callable[[], Observer]) -> None:
        self.name = name
        self.module = module
        self.kind = type(module).__name__
        self.calls = 0
        dim = channel_dim(module)
        self.input = _Tensors(make(), dim)
        self.output = _Tensors(make(), dim)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at everything that goes into the module and comes out of it."""

        def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
            self.calls += 1
            for x in _floating((*args, *kwargs.values())):
                self.input.add(x)

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            for y in _floating(output):
                self.output.add(y)

        # Inputs are looked at before the module runs, which may change them in place.
        handles = (
            self.module.register_forward_pre_hook(before, with_kwargs=True),
            self.module.register_forward_hook(after),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def ranges(self) -> LayerRanges:
        """The result."""
        return LayerRanges(
            self.name, self.kind, self.calls, self.input.range(), self.output.range()
        )


def _floating(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        yield from _floating(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _floating(item)


@contextmanager
def progress_bar(batches: Iterable[Any], wanted: bool | None) -> Iterator[Iterable[Any]]:
    """The batches, with a bar that follows them.

    Args:
        batches: read once.
        wanted: whether to show it; None for on a terminal.
    """
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield batches
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        yield bar.track(batches, description="Calibrating")


def _warn_of_nonfinite(result: Calibration) -> None:
    bad = [layer.name for layer in result if layer.input.nonfinite or layer.output.nonfinite]
    if bad:
        warnings.warn(
            f"calibrate: {len(bad)} of {len(result)} layers saw NaN or Inf, which their ranges "
            f"leave out: {_some(bad)}. Look for what makes them in the batches or in the model",
            stacklevel=3,
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(name or "the model" for name in names[:4]) + more
