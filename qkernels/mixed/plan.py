"""PrecisionPlan: what `search` found out about a model's layers, and what it chose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from typing import TYPE_CHECKING, Any

from qkernels.jsonfile import JsonFile, json_safe
from qkernels.mixed.quality import Quality
from qkernels.schemes import Scheme

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qkernels.mixed.assign import Problem

_VERSION = 1


@dataclass(frozen=True)
class Option:
    """One way to compute a layer.

    Args:
        scheme: how it is quantized, None if it stays as it is.
        seconds: of all its calls for a batch.
        bytes: of its parameters and buffers.
        damage: what the model loses when this layer alone is so; see `Quality`.
    """

    scheme: Scheme | None
    seconds: float
    bytes: int
    damage: float


@dataclass(frozen=True)
class LayerPlan:
    """A layer, or several that share a weight and therefore a scheme.

    Args:
        names: their qualified names.
        kind: class of the float layer.
        dtype: of its weight.
        options: what there is to choose from.
        chosen: which option it is.
    """

    names: tuple[str, ...]
    kind: str
    dtype: str
    options: tuple[Option, ...]
    chosen: int

    @property
    def choice(self) -> Option:
        """The chosen option."""
        return self.options[self.chosen]

    def label(self, option: Option) -> str:
        """What an option is called."""
        return self.dtype if option.scheme is None else repr(option.scheme)


@dataclass(frozen=True)
class Cost:
    """What a whole model costs.

    Args:
        seconds: of a batch.
        bytes: of all parameters and buffers.
        quality: SQNR in dB of its output, or the user's metric.
    """

    seconds: float
    bytes: int
    quality: float


@dataclass(frozen=True)
class PrecisionPlan(Mapping[str, Scheme], JsonFile):
    """A scheme for every layer, with all that `qk.search` measured to choose it.

    It is a mapping from patterns to schemes, so it goes wherever `{"pattern": scheme}` goes:
    `qk.quantize_(model, plan)`, `qk.quantize_calibrated_`, `qk.prepare_qat_`.

    Args:
        model: class of the model.
        objective: what was to be best: "latency", "size" or "accuracy".
        budget: the limits that were to be kept.
        optimize: how scales are chosen; `quantize_` takes it from here.
        measure: what quality is.
        layers: every layer there was a choice for, in the order of the model's modules.
        rest_seconds, rest_bytes: of all other parts of the model.
        reference: the float model as measured.
        uniform: the model as measured with one scheme for all layers, by scheme.
        predicted: the plan, as the sum of its layers (after `replan`, times the correction).
        measured: the plan as it ran; None after `replan`.
        correction: measured damage over the sum of the layers' damages; `front` and `replan`
            multiply by it.
        batch: shapes of the batches that were timed.
        machine: processor, ISA, threads, versions.
        notes: what a reader has to know, as sentences.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> plan = qk.search(model, [torch.randn(32, 64)], budget={"sqnr": 20}, objective="size")
        >>> plan.measured.quality >= 20
        True
        >>> summary = qk.quantize_(model, plan)
        >>> summary.bytes_after == plan.measured.bytes
        True
    """

    model: str
    objective: str
    budget: dict[str, float]
    optimize: str
    measure: Quality
    layers: tuple[LayerPlan, ...]
    rest_seconds: float
    rest_bytes: int
    reference: Cost
    uniform: tuple[tuple[str, Cost], ...]
    predicted: Cost
    measured: Cost | None
    correction: float
    batch: str
    machine: dict[str, str]
    notes: tuple[str, ...]

    def __getitem__(self, pattern: str) -> Scheme:
        for layer in self.layers:
            scheme = layer.choice.scheme
            if scheme is not None and pattern in self._patterns(layer):
                return scheme
        raise KeyError(pattern)

    def __iter__(self) -> Iterator[str]:
        for layer in self.layers:
            if layer.choice.scheme is not None:
                yield from self._patterns(layer)

    def __len__(self) -> int:
        return sum(len(x.names) for x in self.layers if x.choice.scheme is not None)

    @staticmethod
    def _patterns(layer: LayerPlan) -> tuple[str, ...]:
        return tuple(f"={name}" for name in layer.names)

    @property
    def schemes(self) -> dict[str, Scheme | None]:
        """The scheme of every layer by name; None for those that stay as they are."""
        return {name: layer.choice.scheme for layer in self.layers for name in layer.names}

    @property
    def cost(self) -> Cost:
        """What the plan costs: as measured, or else as predicted."""
        return self.measured or self.predicted

    def problem(self) -> Problem:
        """What every option costs, for `qkernels.mixed.assign`."""
        from qkernels.mixed.assign import Problem

        def costs(field: str) -> list[list[float]]:
            return [[getattr(option, field) for option in x.options] for x in self.layers]

        return Problem(
            {"latency": costs("seconds"), "size": costs("bytes"), "accuracy": costs("damage")},
            {"latency": self.rest_seconds, "size": self.rest_bytes},
        )

    def cost_of(self, choice: Sequence[int]) -> Cost:
        """What the sums over layers predict.

        Args:
            choice: the option of each layer.
        """
        problem = self.problem()
        damage = problem.total("accuracy", choice) * self.correction
        return Cost(
            problem.total("latency", choice),
            round(problem.total("size", choice)),
            self.measure.value(damage),
        )

    def front(self, quantity: str, points: int = 24) -> list[Cost]:
        """The best that can be had at any latency, or any size, as predicted: the Pareto front.

        Args:
            quantity: "latency" or "size"; the other one is free.
            points: how many budgets are tried.

        Raises:
            ValueError: another quantity.
            ImportError: scipy is not installed.
        """
        if quantity not in ("latency", "size"):
            raise ValueError(f"front: quantity is {quantity!r}; expected 'latency' or 'size'")
        choices = self.problem().front(quantity, "accuracy", points)
        return [self.cost_of(choice) for choice in choices]

    def replan(self, budget: Mapping[str, float], objective: str | None = None) -> PrecisionPlan:
        """Another choice from the same measurements: at once, without running the model.

        Args:
            budget: limits, as for `qk.search`.
            objective: "latency", "size" or "accuracy"; by default that of this plan.

        Raises:
            ValueError: an unknown limit or objective, or limits that nothing keeps.
            ImportError: scipy is not installed.
        """
        from qkernels.mixed.budget import check_budget, choose, limits_of

        goal = self.objective if objective is None else objective
        check_budget(budget, goal, self.measure.name)
        limits = limits_of(budget, self.reference, self.measure)
        limits = {k: v / self.correction if k == "accuracy" else v for k, v in limits.items()}
        choice = choose(self, goal, budget, limits)
        return self.choosing(choice, goal, budget)

    def choosing(
        self, choice: Sequence[int], objective: str, budget: Mapping[str, float]
    ) -> PrecisionPlan:
        """The plan that takes other options of the same layers; nothing measured about it yet.

        Args:
            choice: the option of each layer.
            objective: what it was chosen for.
            budget: limits that it was chosen under.
        """
        layers = tuple(replace(x, chosen=i) for x, i in zip(self.layers, choice, strict=True))
        return replace(
            self,
            objective=objective,
            budget=dict(budget),
            layers=layers,
            predicted=self.cost_of(choice),
            measured=None,
            notes=(),
        )

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the Pareto fronts, the uniform schemes and this plan into a file.

        Args:
            path: its suffix says the format, such as .png, .svg or .pdf.

        Raises:
            ImportError: matplotlib is not installed (`pip install qkernels[plot]`).
        """
        from qkernels.mixed.plot import save_front

        save_front(self, path)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values; `from_dict` reads them."""
        values = asdict(self)
        values["version"] = _VERSION
        for layer, plain in zip(self.layers, values["layers"], strict=True):
            for option, entry in zip(layer.options, plain["options"], strict=True):
                entry["scheme"] = None if option.scheme is None else option.scheme.to_dict()
        plain_values: dict[str, Any] = json_safe(values)
        return plain_values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PrecisionPlan:
        """The plan that `to_dict` described.

        Args:
            values: a mapping as `to_dict` returns it.

        Raises:
            ValueError: it is none, or is of another version.
        """
        try:
            if values["version"] != _VERSION:
                raise ValueError(f"version is {values['version']!r}, expected {_VERSION}")
            return cls(
                model=str(values["model"]),
                objective=str(values["objective"]),
                budget={str(k): float(v) for k, v in values["budget"].items()},
                optimize=str(values["optimize"]),
                measure=Quality(
                    str(values["measure"]["name"]),
                    float(values["measure"]["reference"]),
                    bool(values["measure"]["lower_is_better"]),
                ),
                layers=tuple(map(_layer, values["layers"])),
                rest_seconds=float(values["rest_seconds"]),
                rest_bytes=int(values["rest_bytes"]),
                reference=_cost(values["reference"]),
                uniform=tuple((str(name), _cost(cost)) for name, cost in values["uniform"]),
                predicted=_cost(values["predicted"]),
                measured=None if values["measured"] is None else _cost(values["measured"]),
                correction=float(values["correction"]),
                batch=str(values["batch"]),
                machine={str(k): str(v) for k, v in values["machine"].items()},
                notes=tuple(map(str, values["notes"])),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"this is not a precision plan that this qkernels can read: {error}"
            ) from None

    def __rich__(self) -> RenderableType:
        from qkernels.mixed.text import renderable

        return renderable(self)

    def __str__(self) -> str:
        from qkernels.summary import table_text

        return table_text(self.__rich__())


def _layer(values: Mapping[str, Any]) -> LayerPlan:
    options = tuple(
        Option(
            None if entry["scheme"] is None else Scheme.from_dict(entry["scheme"]),
            float(entry["seconds"]),
            int(entry["bytes"]),
            float(entry["damage"]),
        )
        for entry in values["options"]
    )
    chosen = int(values["chosen"])
    if not 0 <= chosen < len(options):
        raise ValueError(f"option {chosen} of {len(options)} is chosen")
    names = tuple(map(str, values["names"]))
    return LayerPlan(names, str(values["kind"]), str(values["dtype"]), options, chosen)


def _cost(values: Mapping[str, Any]) -> Cost:
    return Cost(float(values["seconds"]), int(values["bytes"]), float(values["quality"]))
