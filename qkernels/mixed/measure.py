"""What layers cost: the error that each makes in the model's answers, and the time each takes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from qkernels.mixed.quality import Quality
from qkernels.mixed.units import Form, Unit
from qkernels.report.accumulate import Noise
from qkernels.report.outputs import Caller, main_output, real_tokens, shape_text, without_padding
from qkernels.report.trial import LayerClock, standing_in
from qkernels.timing import Ratio, clock, take_turns

Pairs = list[tuple[nn.Module, nn.Module]]
Metric = Callable[[Any, Any], float]
_MIN_ROUNDS = 3


class Answers:
    """The answers of a model to its batches, and how good others are beside them.

    Args:
        caller: calls the float model, in eval mode and without gradients.
        batches: what it is called on. The compared outputs of all of them are kept.
        metric: `metric(output, batch)`, or None for SQNR.
        lower_is_better: whether that is a loss.
        name: of the metric.
    """

    def __init__(
        self,
        caller: Caller,
        batches: Sequence[Any],
        metric: Metric | None,
        lower_is_better: bool,
        name: str,
    ) -> None:
        self._caller = caller
        self._batches = batches
        self._metric = metric
        self._expected: list[Tensor] = []
        if metric is None:
            self._expected = [self._output(caller(b), b).clone() for b in batches]
            self.measure = Quality()
        else:
            self.measure = Quality(name, self._mean_metric(), lower_is_better)

    def quality(self, pairs: Pairs) -> float:
        """SQNR in dB or the metric with other layers in the model; NaN if it answers NaN or Inf.

        Args:
            pairs: float layers with what stands in for them.
        """
        with standing_in(pairs):
            return self._mean_metric() if self._metric is not None else self._sqnr()

    def damage(self, pairs: Pairs) -> float:
        """What the model loses with other layers; inf if it answers NaN or Inf.

        Args:
            pairs: float layers with what stands in for them.
        """
        found = self.measure.damage(self.quality(pairs))
        # A metric may get better by luck, which would not add up.
        return max(found, 0.0) if math.isfinite(found) else math.inf

    def _sqnr(self) -> float:
        noise = Noise()
        for batch, expected in zip(self._batches, self._expected, strict=True):
            noise.add(self._output(self._caller(batch), batch), expected)
        found = noise.sqnr_db
        broken = noise.nonfinite > noise.nonfinite_reference
        return math.nan if found is None or broken else found

    def _mean_metric(self) -> float:
        assert self._metric is not None
        total = count = 0.0
        for batch in self._batches:
            answer = self._caller(batch)
            tensor = main_output(answer).tensor
            size = tensor.shape[0] if tensor.dim() else 1
            total += size * float(self._metric(answer, batch))
            count += size
        return total / count if count else math.nan

    @staticmethod
    def _output(answer: Any, batch: Any) -> Tensor:
        return without_padding(main_output(answer).tensor.detach(), real_tokens(batch))


@dataclass(frozen=True)
class Times:
    """Seconds for a batch.

    Args:
        layers: of every unit, by form.
        rest: of everything between the layers.
        models: of whole models, by contender.
    """

    layers: list[list[float]]
    rest: float
    models: dict[str, float]


@dataclass
class Stopwatch:
    """Times whole models and their layers, contenders taking turns.

    Models are compared round by round: what slows the machine down for a while slows all of them.
    Of layers the fastest run counts, since other programs make a run slower and never faster.

    Args:
        caller: calls the float model.
        batches: one for each shape.
        weights: share of each shape.
        seconds: to spend for one set of contenders.
    """

    caller: Caller
    batches: Sequence[Any]
    weights: Sequence[float]
    seconds: float
    _layers: dict[tuple[str, int], dict[str, list[float]]] = field(default_factory=dict)

    def models(
        self, contenders: Mapping[str, Pairs], clocked: Mapping[str, nn.Module] | None = None
    ) -> dict[str, float]:
        """Seconds for a batch: of the first the fastest run, of others that times their ratio.

        Args:
            contenders: by name, float layers with what stands in for them.
            clocked: modules to time as well, in runs of their own; `layer_seconds` has the result.
        """
        self._layers = {}
        rounds = self._rounds(contenders, clocked, max_rounds=100)
        first = next(iter(contenders))
        fastest = self._mean(min(r[first][i] for r in rounds) for i in range(len(self.batches)))
        return {name: fastest * self._ratio(rounds, name, first).median for name in contenders}

    def compare(self, model: Pairs, other: Pairs) -> Ratio:
        """How long a model takes, over the time of another that takes turns with it.

        Args:
            model: float layers with what stands in for them.
            other: the same for the other.
        """
        rounds = self._rounds({"model": model, "other": other}, None, max_rounds=400)
        return self._ratio(rounds, "model", "other")

    def _rounds(
        self,
        contenders: Mapping[str, Pairs],
        clocked: Mapping[str, nn.Module] | None,
        max_rounds: int,
    ) -> list[dict[str, list[float]]]:
        """The seconds of every batch by contender, round by round."""

        def run(name: str, pairs: Pairs) -> list[float]:
            seconds = []
            with standing_in(pairs):
                for i, batch in enumerate(self.batches):
                    start = clock()
                    self.caller(batch)
                    seconds.append(clock() - start)
                    if clocked is not None:
                        self._clock_layers(clocked, (name, i), batch)
            return seconds

        for pairs in contenders.values():  # the first call of a layer allocates
            with standing_in(pairs):
                for batch in self.batches:
                    self.caller(batch)
        calls = {name: partial(run, name, pairs) for name, pairs in contenders.items()}
        return list(take_turns(calls, self.seconds, _MIN_ROUNDS, max_rounds))

    def _ratio(self, rounds: Sequence[Mapping[str, list[float]]], name: str, other: str) -> Ratio:
        return Ratio.of([self._mean(r[name]) / self._mean(r[other]) for r in rounds])

    def layer_seconds(self, contender: str, layer: str) -> float:
        """Seconds of a layer for a batch, from the last call of `models`.

        Args:
            contender: which model it ran in.
            layer: name of the module.
        """
        return self._mean(
            min(self._layers[contender, i].get(layer, [0.0])) for i in range(len(self.batches))
        )

    def _clock_layers(
        self, layers: Mapping[str, nn.Module], key: tuple[str, int], batch: Any
    ) -> None:
        with LayerClock(layers).running() as seconds:
            self.caller(batch)
        record = self._layers.setdefault(key, {})
        for name, value in seconds.items():
            record.setdefault(name, []).append(value)

    def _mean(self, values: Iterable[float]) -> float:
        return sum(w * v for w, v in zip(self.weights, values, strict=True))


def time_layers(watch: Stopwatch, units: Sequence[Unit], schemes: Sequence[Any]) -> Times:
    """Time every layer in every form, inside the model, with one scheme for all layers at a time.

    Layers of one shape with inputs of one shape have one time, the mean of theirs: differences
    between them are noise, which a search would take for gains.

    Args:
        watch: has the batches.
        units: the layers.
        schemes: every scheme that some unit takes.
    """
    contenders: dict[str, Pairs] = {"float": []}
    for scheme in schemes:
        contenders[repr(scheme)] = uniform_pairs(units, scheme)
    modules = {n: m for u in units for n, m in zip(u.names, u.modules, strict=True)}
    models = watch.models(contenders, clocked=modules)

    def seconds(unit: Unit, form: Form) -> float:
        label = "float" if form.scheme is None else repr(form.scheme)
        return sum(watch.layer_seconds(label, name) for name in unit.names)

    alike: dict[object, list[int]] = {}
    shapes = _input_shapes(watch, modules)
    for i, unit in enumerate(units):
        alike.setdefault(_what_it_computes(unit, shapes), []).append(i)
    layers: list[list[float]] = [[] for _ in units]
    for members in alike.values():
        for k in range(len(units[members[0]].forms)):
            mean = statistics.fmean(seconds(units[i], units[i].forms[k]) for i in members)
            for i in members:
                layers[i].append(mean)

    def inside(label: str) -> float:
        return sum(watch.layer_seconds(label, name) for name in modules)

    rest = statistics.fmean(max(total - inside(label), 0.0) for label, total in models.items())
    return Times(layers, rest, models)


def uniform_pairs(units: Iterable[Unit], scheme: Any) -> Pairs:
    """What stands in for the layers of a model with one scheme, those that do not take it left.

    Args:
        units: the layers.
        scheme: for all of them.
    """
    return [pair for unit in units for pair in unit.pairs(unit.form_of(scheme))]


def _input_shapes(watch: Stopwatch, modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """The shapes of every layer's inputs, call by call."""
    found: dict[str, list[str]] = {}
    with watching_inputs(modules, lambda n, x: found.setdefault(n, []).append(shape_text(x))):
        for batch in watch.batches:
            watch.caller(batch)
    return found


@contextmanager
def watching_inputs(
    modules: Mapping[str, nn.Module], see: Callable[[str, Any], None]
) -> Iterator[None]:
    """Show the arguments of every call of some modules.

    Args:
        modules: by name.
        see: called with the name and the positional and keyword arguments, as one tuple.
    """

    def hook_for(name: str) -> Any:
        return lambda _module, args, kwargs: see(name, (*args, *kwargs.values()))

    handles = [
        module.register_forward_pre_hook(hook_for(name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _what_it_computes(unit: Unit, shapes: Mapping[str, list[str]]) -> object:
    """The same for units that take the same time: kind, geometry, forms, inputs."""
    return (
        unit.dtype,
        tuple((type(m), m.extra_repr()) for m in unit.modules),
        tuple(form.scheme for form in unit.forms),
        tuple(tuple(shapes.get(name, ())) for name in unit.names),
    )


def by_shape(batches: Sequence[Any]) -> tuple[list[Any], list[float]]:
    """The first batch of each shape, and the share of batches that have it.

    Args:
        batches: of any shapes.
    """
    first: dict[str, Any] = {}
    counts: dict[str, int] = {}
    for batch in batches:
        shape = shape_text(batch)
        first.setdefault(shape, batch)
        counts[shape] = counts.get(shape, 0) + 1
    return list(first.values()), [counts[shape] / len(batches) for shape in first]
