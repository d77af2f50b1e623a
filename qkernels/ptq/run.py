"""quantize_calibrated_: a whole model, layer by layer, with calibration data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.attention import attention_split
from qkernels.calibration import Calibration, Int8Range
from qkernels.nn import QModule
from qkernels.nn.kinds import QUANTIZED, base_of
from qkernels.nn.parents import replace_everywhere, settle_parents
from qkernels.plan import Step
from qkernels.ptq.blocks import Group, trace
from qkernels.ptq.checkpoint import Checkpoint, Finished, identity_of
from qkernels.ptq.layer import (
    FloatLayer,
    QuantizedLayer,
    build,
    correct_bias,
    float_outputs,
    solve,
    sqnr_db,
)
from qkernels.ptq.options import OP, Options, check_layers, checked_options
from qkernels.ptq.replay import Replay
from qkernels.ptq.statistics import LayerStatistics
from qkernels.quantize import (
    DEFAULT_IGNORE,
    input_range,
    plan_of,
    quantized_like_float,
    shown_progress,
    summary_of,
)
from qkernels.schemes import Scheme
from qkernels.summary import Summary


@torch.inference_mode(False)  # what is made must be usable outside of it
@torch.no_grad()
def quantize_calibrated_(
    model: nn.Module,
    batches: Iterable[Any],
    scheme: Scheme | Mapping[str, Scheme],
    method: str | Sequence[str] = "gptq",
    *,
    ignore: str | Sequence[str] = DEFAULT_IGNORE,
    calibration: Calibration | None = None,
    optimize: str = "mse",
    act_order: str = "static",
    damping: float = 0.01,
    alpha: float | None = None,
    held_out: Iterable[Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    call: Callable[[nn.Module, Any], Any] | None = None,
    progress: bool | None = None,
) -> Summary:
    """Replace the layers of a model by quantized ones that suit its data, in place.

    Linear and Conv layers are quantized one after the other, in the order in which they run, each
    for the inputs that the layers before it now give. Embeddings, layers that share their weight
    with one, and layers that no batch reaches are quantized without data, with `optimize`. What is
    quantized and what is left is decided as `quantize_` does. The inputs of one block of the model
    (a child of an `nn.ModuleList` or `nn.Sequential`) are kept for all batches, and one layer's
    features × features matrix; a block runs once for each group of its layers that share an input.
    To a convolution, a feature is an input channel at one element of its kernel, and groups of
    channels have matrices of their own. BatchNorms are left alone: fold them before, with
    `qk.fold_batchnorm_`.

    Args:
        model: float model on the CPU. It is changed; if the run is interrupted, in part.
        batches: tensors, tuples or lists (positional arguments) or mappings (keyword arguments),
            such as a hundred typical inputs. They are kept until the end.
        scheme: one scheme for all layers, or schemes by pattern, as for `quantize_`.
        method: one or more of "gptq" (rounding that makes up for its errors), "awq" or
            "smoothquant" (factors between x and the weight, kept as the layer's `x_premul`; for
            4-bit weights and for int8 activations; Linear layers only), and "bias_correction" (of
            the output's mean; layers without bias are left out).
        ignore: patterns of modules that stay float, as for `quantize_`.
        calibration: what `qk.calibrate` returned for the float model; static schemes need it.
        optimize: how scales are chosen, "mse", "minmax" or "hqq", see `qk.optimize.search_scales`.
        act_order: for "gptq": columns with large inputs first, "static" with groups as they are,
            "permute" with groups in that order (the layer gets a `k_perm`; "static" for
            convolutions), or "none".
        damping: for "gptq": share of the mean of the diagonal that is added to it.
        alpha: for "smoothquant", how much of the range of x goes to the weight, 0.5 by default; for
            "awq", the exponent, searched for by default.
        held_out: batches to measure the layers' errors on; by default the last eighth of
            `batches`, which is then not calibrated with, if there are two or more.
        checkpoint: folder for finished layers. When the same call is made again with the float
            model after an interruption, they are taken from there, and the result is the same to
            the bit.
        call: `call(model, batch)` for models that are called in another way.
        progress: show a progress bar; by default only for large models on a terminal.

    Returns:
        A summary of every module, with the SQNR of each calibrated layer's output on held-out data,
        rounded to nearest (`sqnr_nearest`) and as it is now (`sqnr`).

    Raises:
        TypeError: an argument of another type, or a batch that the model cannot be called with.
        ValueError: an unknown method or setting, no batches, or what `quantize_` refuses.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> batches = [torch.randn(32, 64) for _ in range(8)]
        >>> summary = qk.quantize_calibrated_(model, batches, qk.W4A16(group_size=32))
        >>> all(row.sqnr > row.sqnr_nearest for row in summary.converted)
        True
    """
    options = checked_options(method, optimize, act_order, damping, alpha)
    with attention_split(model):
        return _quantize(
            *(model, batches, scheme, options, ignore, calibration, held_out),
            *(checkpoint, call, progress),
        )


def _quantize(
    model: nn.Module,
    batches: Iterable[Any],
    scheme: Scheme | Mapping[str, Scheme],
    options: Options,
    ignore: str | Sequence[str],
    calibration: Calibration | None,
    held_out: Iterable[Any] | None,
    checkpoint: str | os.PathLike[str] | None,
    call: Callable[[nn.Module, Any], Any] | None,
    progress: bool | None,
) -> Summary:
    steps = plan_of(OP, model, scheme, ignore, calibration=calibration)
    data, held = _split(batches, held_out)
    units, without_data = _units(model, steps)
    check_layers(options, {s: model.get_submodule(s.names[0]) for unit in units for s in unit})
    with _evaluating(model):
        run = trace(model, [*data, *held], [tuple(s.names[0] for s in u) for u in units], call)
        work = _Work(model, units, options, calibration, len(data), len(held))
        store = None
        if checkpoint is not None:
            store = Checkpoint(
                checkpoint, _identity(model, steps, options, calibration, data, held)
            )
        replay = Replay(model, [*data, *held], run, call)
        with shown_progress("Calibrating", [s for s in steps if s.scheme], progress) as advance:
            for step in (*without_data, *work.unreached(run.groups)):
                work.convert_without_data(step)
                advance(step)
            for group in run.groups:
                for step in work.convert(group, replay, store):
                    advance(step)
    became = {s.names: f"{work.kind(s)} {s.scheme}" for s in steps if s.scheme is not None}
    title = f"{type(model).__name__} quantized with {' and '.join(options.method)}"
    return summary_of(title, model, steps, became, work.quality, work.notes)


class _Work:
    """The layers of a run: their float modules give way to quantized ones."""

    def __init__(
        self,
        model: nn.Module,
        units: list[list[Step]],
        options: Options,
        calibration: Calibration | None,
        data: int,
        held: int,
    ) -> None:
        self.quality: dict[str, tuple[float, float]] = {}
        self._model = model
        self._units = units
        self._number = {step.names[0]: i for i, unit in enumerate(units) for step in unit}
        self._options = options
        self._calibration = calibration
        self._data = data
        self._held = held
        self._done: dict[str, QModule] = {}
        self.notes = {
            name: note
            for name in self._number
            if (note := options.note_for(self._float_layer(name)))
        }

    def kind(self, step: Step) -> str:
        """The class that a step's module has now."""
        return type(self._model.get_submodule(step.names[0])).__name__

    def unreached(self, groups: list[Group]) -> list[Step]:
        """Layers that no batch got to."""
        reached = {name for group in groups for name in group.layers}
        found = [s for unit in self._units for s in unit if s.names[0] not in reached]
        # Of layers that share a weight, one that ran is enough.
        found = [s for s in found if not any(t.names[0] in reached for t in self._unit(s))]
        self.notes.update((s.names[0], "not reached by any batch: no data used") for s in found)
        return found

    def _unit(self, step: Step) -> list[Step]:
        return self._units[self._number[step.names[0]]]

    def convert_without_data(self, step: Step) -> None:
        assert step.scheme is not None
        old = self._model.get_submodule(step.names[0])
        twin = self._done.get(step.twin or "")
        x_range = input_range(step, old, self._calibration)
        optimize = self._options.optimize
        self._put(step, quantized_like_float(old, step.scheme, twin, x_range, optimize))

    def convert(self, group: Group, replay: Replay, store: Checkpoint | None) -> list[Step]:
        """Quantize the layers of a group, or take them from the checkpoint; says which."""
        numbers = list(dict.fromkeys(self._number[name] for name in group.layers))
        found: dict[int, Finished] = {}
        for number in numbers if store is not None else ():
            assert store is not None
            first = self._units[number][0]
            assert first.scheme is not None
            shape = _matrix(self._float_layer(first.names[0])).shape
            finished = store.load(number, first.scheme, shape)
            if finished is not None:
                found[number] = finished
        stats = None if len(found) == len(numbers) else self._statistics(group, replay)
        for number in numbers:
            unit = self._units[number]
            if number in found:
                self._restore(unit, found[number])
            else:
                assert stats is not None
                finished = self._solve(unit, stats[number])
                if store is not None:
                    store.save(number, finished)
        settle_parents(self._model)
        return [step for number in numbers for step in self._units[number]]

    def _statistics(self, group: Group, replay: Replay) -> dict[int, LayerStatistics]:
        """By number of the unit; units that read the same of their input share statistics."""
        by_reading: dict[object, LayerStatistics] = {}
        found: dict[int, LayerStatistics] = {}
        layers: dict[str, FloatLayer] = {}
        for name in group.layers:
            layer = layers[name] = self._float_layer(name)
            number = self._number[name]
            if number not in found:
                options, key = self._options.for_layer(layer), _reading(layer)
                if key not in by_reading:
                    by_reading[key] = LayerStatistics(layer, options.needs_moments)
                found[number] = by_reading[key]
        # Where layers share an input, it is shown once, for each way of reading it.
        readers = {id(found[self._number[name]]): name for name in reversed(group.layers)}

        def see(i: int, name: str, x: Tensor) -> None:
            names = readers.values() if len(found) > 1 else (name,)
            for reader in names:
                stats = found[self._number[reader]]
                if i < self._data:
                    stats.add(layers[reader], x)
                else:
                    stats.hold_out(layers[reader], x, self._held)

        replay.run(group, see)
        return found

    def _solve(self, unit: list[Step], stats: LayerStatistics) -> Finished:
        old = [self._float_layer(step.names[0]) for step in unit]
        schemes = [step.scheme for step in unit if step.scheme is not None]
        ranges = self._ranges(unit, old)
        options = self._options.for_layer(old[0])
        inputs = stats.held_out
        expected = [float_outputs(layer, inputs) for layer in old]
        nearest: list[float | None] = [None] * len(old)
        if inputs:
            for i, (layer, scheme, x_range) in enumerate(zip(old, schemes, ranges, strict=True)):
                plain = quantized_like_float(layer, scheme, None, x_range)
                nearest[i] = sqnr_db(expected[i], plain, inputs)  # type: ignore[arg-type]
        solved = solve(_matrix(old[0]), schemes[0], stats, options)
        layers = build(old, schemes, ranges, solved)
        quality: list[tuple[float, float] | None] = []
        for layer, new, y, before in zip(old, layers, expected, nearest, strict=True):
            if "bias_correction" in options.method:
                correct_bias(layer, new, stats)
            quality.append(None if before is None else (before, sqnr_db(y, new, inputs)))
        finished = Finished(solved, tuple(new.bias for new in layers), tuple(quality))
        self._put_all(unit, layers, finished)
        return finished

    def _restore(self, unit: list[Step], finished: Finished) -> None:
        old = [self._float_layer(step.names[0]) for step in unit]
        schemes = [step.scheme for step in unit if step.scheme is not None]
        layers = build(old, schemes, self._ranges(unit, old), finished.solved)
        for new, bias in zip(layers, finished.biases, strict=True):
            if new.bias is not None and bias is not None:
                new.bias.copy_(bias)
        self._put_all(unit, layers, finished)

    def _put_all(
        self, unit: list[Step], layers: Sequence[QuantizedLayer], finished: Finished
    ) -> None:
        for step, new, quality in zip(unit, layers, finished.quality, strict=True):
            self._put(step, new)
            if quality is not None:
                self.quality[step.names[0]] = quality

    def _put(self, step: Step, new: QModule) -> None:
        old = self._model.get_submodule(step.names[0])
        replace_everywhere(self._model, step.names, old, new)
        self._done[step.names[0]] = new

    def _ranges(self, unit: list[Step], old: list[FloatLayer]) -> list[Int8Range | None]:
        pairs = zip(unit, old, strict=True)
        return [input_range(step, layer, self._calibration) for step, layer in pairs]

    def _float_layer(self, name: str) -> FloatLayer:
        found = self._model.get_submodule(name)
        assert isinstance(found, FloatLayer)
        return found


def _matrix(layer: FloatLayer) -> Tensor:
    kind = base_of(layer)
    assert kind is not None
    return QUANTIZED[kind].matrix_of(layer)


def _reading(layer: FloatLayer) -> object:
    """The same for layers whose weights meet the same numbers if they get the same input."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    names = ("kernel_size", "stride", "padding", "dilation", "transposed", "output_padding")
    return (*(getattr(layer, name) for name in (*names, "groups", "padding_mode")),)


def _split(batches: Iterable[Any], held_out: Iterable[Any] | None) -> tuple[list[Any], list[Any]]:
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{OP}: batches is a {type(batches).__name__}; expected several "
            "batches, such as a list or a DataLoader"
        )
    data = list(batches)
    held = [] if held_out is None else list(held_out)
    if held_out is None and len(data) > 1:
        count = max(1, len(data) // 8)
        data, held = data[:-count], data[-count:]
    if not data:
        raise ValueError(f"{OP}: batches is empty; pass at least one batch")
    return data, held


def _units(model: nn.Module, steps: list[Step]) -> tuple[list[list[Step]], list[Step]]:
    """Layers to calibrate, those that share a weight together, and layers to do without data."""
    units: dict[str, list[Step]] = {}
    for step in steps:
        if step.scheme is not None:
            units.setdefault(step.twin or step.names[0], []).append(step)

    def takes_data(unit: list[Step]) -> bool:
        modules = [model.get_submodule(step.names[0]) for step in unit]
        return all(isinstance(m, FloatLayer) and m.weight.numel() > 0 for m in modules)

    calibrated = [unit for unit in units.values() if takes_data(unit)]
    rest = [step for unit in units.values() if not takes_data(unit) for step in unit]
    return calibrated, rest


def _identity(
    model: nn.Module,
    steps: list[Step],
    options: Options,
    calibration: Calibration | None,
    data: list[Any],
    held: list[Any],
) -> str:
    settings = {
        "layers": [
            [list(s.names), None if s.scheme is None else s.scheme.to_dict()] for s in steps
        ],
        "options": [*options.method, options.optimize, options.act_order],
        "numbers": [options.damping, options.alpha],
        "batches": [len(data), len(held)],
        "calibration": None if calibration is None else calibration.to_dict(),
    }
    state = (*model.parameters(), *model.buffers())
    return identity_of(settings, state, [*data, *held])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and no cache of keys and values, which every run of a block would make longer."""
    flags = {name: module.training for name, module in model.named_modules()}
    config = getattr(model, "config", None)
    caches = getattr(config, "use_cache", None)
    model.eval()
    if caches:
        config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = flags.get(name, model.training)
        if caches:
            config.use_cache = caches  # type: ignore[union-attr]
