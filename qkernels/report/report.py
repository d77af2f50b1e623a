"""What `compare` found out, and the ways to read it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

from qkernels.jsonfile import json_safe
from qkernels.report.files import write_atomically
from qkernels.timing import Timing

if TYPE_CHECKING:
    from qkernels.mixed.plan import PrecisionPlan


@dataclass(frozen=True)
class Layer:
    """One layer of both models. SQNR in dB, sizes in bytes.

    `sqnr_db` is measured inside the model, so it holds the error of all layers before;
    `own_sqnr_db` on the reference's input to the layer (quantized layers only). None: never ran.
    `scheme` is how it is quantized. `seconds` and `reference_seconds` are of all its calls for the
    batch that latency is measured on. `share` is what it adds to the output's error on that batch:
    the noise with this layer alone quantized, over the sum of all such. `input_outlier` is the
    largest magnitude in a channel of the reference's input over the median channel's;
    `weight_outlier` the largest weight over their root mean square. None: not measured.
    """

    name: str
    kind: str
    quantized: bool
    calls: int
    sqnr_db: float | None
    own_sqnr_db: float | None
    max_abs_error: float
    nonfinite: int
    bytes: int
    reference_bytes: int
    scheme: str | None = None
    seconds: float | None = None
    reference_seconds: float | None = None
    share: float | None = None
    input_outlier: float | None = None
    weight_outlier: float | None = None


@dataclass(frozen=True)
class Metric:
    """The user's own measure of both models."""

    name: str
    model: float
    reference: float


@dataclass(frozen=True)
class Latency:
    """Times of one batch, both models interleaved in one process."""

    batch: str
    model: Timing
    reference: Timing

    @property
    def speedup(self) -> float:
        """Median of the reference over median of the model: above 1 the model is faster."""
        return self.reference.median / self.model.median


@dataclass(frozen=True)
class Report:
    """A comparison of a model with its reference, as `qkernels.compare` returns it.

    Args:
        model, reference: what the two sides are called.
        output: which output was compared (`logits`, `last_hidden_state`, `output` …).
        batches, rows: how many batches and output vectors it was measured on.
        agreement: share of equal argmax predictions, None where the output is not logits.
        predictions: how many predictions that is a share of.
        cosine_mean, cosine_min: cosine over output vectors, None if none was finite.
        sqnr_db: signal to quantization noise of the output, inf if identical.
        max_abs_error: largest difference of two output values.
        nonfinite, nonfinite_reference: output vectors that hold NaN or Inf.
        metric: the user's metric, or None.
        layers: in the order of first execution.
        bytes, reference_bytes: parameters and buffers, each storage once.
        latency: None if it was not measured.
        machine: processor, ISA, threads, versions.
        notes: what a reader has to know about the measurement, as sentences.
        plan: the search that the model comes from, if it was given.
    """

    model: str
    reference: str
    output: str
    batches: int
    rows: int
    agreement: float | None
    predictions: int
    cosine_mean: float | None
    cosine_min: float | None
    sqnr_db: float | None
    max_abs_error: float
    nonfinite: int
    nonfinite_reference: int
    metric: Metric | None
    layers: tuple[Layer, ...]
    bytes: int
    reference_bytes: int
    latency: Latency | None
    machine: dict[str, str]
    notes: tuple[str, ...]
    plan: PrecisionPlan | None = None

    @property
    def compression(self) -> float:
        """Bytes of the reference over bytes of the model."""
        return self.reference_bytes / self.bytes if self.bytes else math.inf

    @property
    def verdict(self) -> str:
        """The comparison in one or two sentences."""
        from qkernels.report.words import verdict

        return verdict(self)

    @property
    def advice(self) -> tuple[str, ...]:
        """What to do about accuracy, time and memory, as sentences; empty if nothing is wrong."""
        from qkernels.report.advice import advice

        return advice(self)

    @property
    def error_starts_at(self) -> str | None:
        """The first layer whose noise inside the model is at least a tenth of the output's."""
        from qkernels.report.advice import error_start

        first = error_start(self)
        return None if first is None else first.name

    def to_dict(self) -> dict[str, Any]:
        """The whole report as JSON types.

        JSON has no infinity: a number that is inf or nan becomes the string "inf", "-inf", "nan".
        """
        plain = asdict(self)
        if self.latency is not None:
            plain["latency"] = {
                "batch": self.latency.batch,
                "model": self.latency.model.to_dict(),
                "reference": self.latency.reference.to_dict(),
                "speedup": self.latency.speedup,
            }
        plain["compression"] = self.compression
        plain["verdict"] = self.verdict
        plain["advice"] = self.advice
        plain["error_starts_at"] = self.error_starts_at
        plain["plan"] = None if self.plan is None else self.plan.to_dict()
        result: dict[str, Any] = json_safe(plain)
        return result

    def save_json(self, path: str | PathLike[str]) -> None:
        """Write `to_dict()` as JSON; an existing file is replaced in one step or not at all.

        Args:
            path: the file to write.
        """
        write_atomically(path, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")

    def save_html(self, path: str | PathLike[str]) -> None:
        """Write one self-contained HTML page with numbers, plots and tables.

        Plots need matplotlib (`pip install qkernels[plot]`); without it the page says so and holds
        the tables alone. An existing file is replaced in one step or not at all.

        Args:
            path: the file to write.
        """
        from qkernels.report.html import render

        write_atomically(path, render(self))

    def print(self) -> None:
        """Print the report with colours if the terminal has them."""
        from qkernels.report.text import renderable
        from qkernels.terminal import console

        console().print(renderable(self))

    def __str__(self) -> str:
        from qkernels.report.text import renderable
        from qkernels.terminal import plain_text

        return plain_text(renderable(self))
