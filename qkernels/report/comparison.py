"""`compare`: what quantization did to a model's answers, its size and its speed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from qkernels.attention import Split, attention_split, whole
from qkernels.nn import QModule, QMultiheadAttention
from qkernels.report.accumulate import Noise, RowStatistics, looks_like_logits
from qkernels.report.layer_costs import error_shares, layer_seconds
from qkernels.report.layers import LayerProbe, LayerRecord, ending_alike
from qkernels.report.machine import machine_facts
from qkernels.report.modules import is_compiled, is_quantized, kind_of, label_of
from qkernels.report.outliers import input_outlier, weight_outlier
from qkernels.report.outputs import (
    Caller,
    evaluating,
    main_output,
    real_tokens,
    shape_text,
    without_padding,
)
from qkernels.report.report import Latency, Layer, Metric, Report
from qkernels.report.size import bytes_under, module_bytes
from qkernels.timing import interleave

if TYPE_CHECKING:
    from qkernels.mixed.plan import PrecisionPlan

T = TypeVar("T")


def compare(
    model: nn.Module,
    reference: nn.Module,
    batches: Iterable[Any],
    *,
    metric: Callable[[Any, Any], float] | None = None,
    evaluate: Callable[[nn.Module, Iterable[Any]], float] | None = None,
    latency: bool = True,
    per_layer: bool = True,
    agreement: bool | None = None,
    call: Callable[[nn.Module, Any], Any] | None = None,
    names: tuple[str, str] | None = None,
    latency_budget: float = 4.0,
    share_budget: float = 30.0,
    plan: PrecisionPlan | None = None,
) -> Report:
    """Compare a quantized model with the model it was made from, on the same batches.

    Both models run in eval mode and without gradients; their training flags are restored. Batches
    are read once and none is kept but the first, on which latency is measured. With `per_layer`
    the outputs of the compared layers are held for one batch at a time, so smaller batches need
    less memory.

    The output that is compared is the tensor a model returns; of a mapping, a Hugging Face output
    or an object: `logits`, else `last_hidden_state`, else the first floating-point tensor; of a
    tuple its first floating-point tensor. Tokens that the batch's `attention_mask` marks as
    padding are left out. Cosine is taken over vectors along the last dimension (over whole samples
    for images), SQNR = 10·log10(Σ reference² / Σ (model − reference)²) over all values.

    Args:
        model: the model under test.
        reference: the model to compare with, of the same architecture.
        batches: tensors, tuples or lists (positional arguments) or mappings (keyword arguments).
            What `forward` has no parameter for, such as labels, is not passed to it.
        metric: `metric(output, batch) -> float` for one batch, averaged over batches weighted by
            batch size; it gets what the model returned.
        evaluate: `evaluate(model, batches) -> float` as an alternative to `metric`; batches must
            be readable more than once.
        latency: whether to time both models on the first batch, interleaved.
        per_layer: whether to compare layers that have the same name in both.
        agreement: whether argmax of the output is a prediction; None decides by the output:
            `logits` or a plain tensor [..., classes] whose rows are not all of length one.
        call: `call(model, batch)` for models that are called in another way.
        names: what to call (model, reference) in the report.
        latency_budget: seconds to spend on timing.
        share_budget: seconds to spend on what each layer adds to the error, for which the
            reference runs the first batch once for each quantized layer, with that layer in it. If
            they are not enough, it is left out, and a note says so.
        plan: what `search` returned, if the model comes from it; its Pareto front is shown.

    Returns:
        A `Report`: print it, or `save_html`, `save_json`, `to_dict` it.

    Raises:
        ValueError: no batches, the same object twice, or outputs or layers of different shapes.
        TypeError: a batch or an output of a kind that is not understood.

    Example:
        >>> import copy, torch, qkernels as qk
        >>> reference = torch.nn.Sequential(torch.nn.Linear(64, 8))
        >>> model = copy.deepcopy(reference)
        >>> _ = qk.quantize_(model, qk.W8A8())
        >>> report = qk.compare(model, reference, [torch.randn(16, 64)], latency=False)
        >>> report.cosine_mean > 0.99
        True
    """
    _check(model, reference, batches, metric, evaluate)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model, reference))
        stack.enter_context(torch.no_grad())
        apart = {name for name, m in model.named_modules() if isinstance(m, QMultiheadAttention)}
        splits = stack.enter_context(attention_split(reference, apart if per_layer else ()))
        run = _Comparison(model, reference, call, agreement, splits)
        if per_layer:
            run.probe_layers()
        for batch in _with_progress(batches):
            run.add(batch, metric)
        if run.first is None:
            raise ValueError("compare: batches is empty; pass at least one batch")
        measured = metric and Metric(_name_of(metric), *run.metric_means())
        if evaluate is not None:
            measured = Metric(
                _name_of(evaluate),
                float(evaluate(model, batches)),
                float(evaluate(reference, batches)),
            )
        timing = run.time(latency_budget) if latency else None
        if run.probe is not None:
            run.measure_shares(share_budget)
        return run.report(names, measured, timing, plan)


def _check(model: Any, reference: Any, batches: Any, metric: Any, evaluate: Any) -> None:
    for argument, value in (("model", model), ("reference", reference)):
        if not isinstance(value, nn.Module):
            raise TypeError(
                f"compare: {argument} must be a torch.nn.Module, got {type(value).__name__}"
            )
    if model is reference:
        raise ValueError(
            "compare: model and reference are the same object, so there is nothing to compare; "
            "keep copy.deepcopy(model) as the reference before you quantize"
        )
    if isinstance(batches, (torch.Tensor, dict)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"compare: batches must be an iterable of batches, got one {type(batches).__name__}; "
            f"pass [batch]"
        )
    if metric is not None and evaluate is not None:
        raise ValueError("compare: metric and evaluate are two ways to say one thing; pass one")
    if evaluate is not None and iter(batches) is batches:
        raise ValueError(
            "compare: evaluate reads the batches again, but batches is an iterator that can be "
            "read once; pass a list or a DataLoader"
        )


@dataclass
class _Comparison:
    """The state of one comparison while batches pass by."""

    model: nn.Module
    reference: nn.Module
    call: Callable[[nn.Module, Any], Any] | None
    agreement: bool | None
    splits: list[Split]
    probe: LayerProbe | None = None
    first: Any = None
    batches: int = 0
    output: str = ""
    rows: RowStatistics = field(default_factory=RowStatistics)
    noise: Noise = field(default_factory=Noise)
    notes: list[str] = field(default_factory=list)
    padded: bool = False

    def __post_init__(self) -> None:
        self.call_model = Caller(self.model, self.call)
        self.call_reference = Caller(self.reference, self.call)
        self.metric_sums = [0.0, 0.0]
        self.seconds: dict[str, dict[str, float]] = {"model": {}, "reference": {}}
        self.shares: dict[str, float] = {}
        self.samples = 0

    def probe_layers(self) -> None:
        """Compare layers too, if the two models share any by name."""
        if is_compiled(self.model) or is_compiled(self.reference):
            self.notes.append(
                "Layers were not compared, because a compiled model does not run them one by one; "
                "compare the model before torch.compile for that."
            )
            return
        probe = LayerProbe(self.model, self.reference, is_quantized)
        if probe.reference_layers:
            self.probe = probe
        else:
            self.notes.append(
                "Layers were not compared, because no layer has the same name in both models."
            )

    def add(self, batch: Any, metric: Callable[[Any, Any], float] | None) -> None:
        """Run both models on one batch and add what they answer to the sums."""
        tokens = real_tokens(batch)
        if self.probe is None:
            reference_answer, answer = self.call_reference(batch), self.call_model(batch)
        else:
            with self.probe.on_reference(tokens):
                reference_answer = self.call_reference(batch)
            with self.probe.on_model(tokens):
                answer = self.call_model(batch)
        expected, actual = main_output(reference_answer), main_output(answer)
        if expected.tensor.shape != actual.tensor.shape:
            raise ValueError(
                f"compare: {actual.name} of the model has shape {tuple(actual.tensor.shape)} but "
                f"{expected.name} of the reference {tuple(expected.tensor.shape)}; compare two "
                f"models of the same architecture"
            )
        if self.first is None:
            self.first = batch
            self.output = actual.name
            if self.agreement is None:
                self.agreement = looks_like_logits(expected.name, expected.tensor)
        out = without_padding(actual.tensor, tokens)
        self.padded |= out.shape != actual.tensor.shape
        ref = without_padding(expected.tensor, tokens)
        self.rows.add(out, ref, agreement=bool(self.agreement))
        self.noise.add(out, ref)
        if metric is not None:
            count = actual.tensor.shape[0] if actual.tensor.dim() else 1
            self.metric_sums[0] += count * float(metric(answer, batch))
            self.metric_sums[1] += count * float(metric(reference_answer, batch))
            self.samples += count
        self.batches += 1

    def metric_means(self) -> tuple[float, float]:
        """The metric of (model, reference), averaged over samples."""
        samples = max(self.samples, 1)
        return self.metric_sums[0] / samples, self.metric_sums[1] / samples

    def time(self, budget: float) -> Latency:
        """Both models on the first batch, in turns."""
        with whole(self.reference, self.splits):
            times = interleave(
                {
                    "model": lambda: self.call_model(self.first),
                    "reference": lambda: self.call_reference(self.first),
                },
                budget=budget,
            )
        if self.probe is not None:
            sides = {
                "model": (self.probe.model_layers, lambda: self.call_model(self.first)),
                "reference": (self.probe.reference_layers, lambda: self.call_reference(self.first)),
            }
            self.seconds = layer_seconds(sides, budget / 2)
        return Latency(shape_text(self.first), times["model"], times["reference"])

    def measure_shares(self, budget: float) -> None:
        """What each quantized layer alone adds to the error of the output."""
        assert self.probe is not None
        pairs = {
            name: (self.probe.reference_layers[name], layer)
            for name, layer in self.probe.model_layers.items()
            if is_quantized(layer) and name in self.probe.records
        }
        with ending_alike(pairs.values()):
            shares = error_shares(self.call_reference, self.first, pairs, budget)
        if shares is None:
            self.notes.append(
                f"What each layer adds to the error was not measured, because it takes more than "
                f"share_budget={budget:g} seconds for {len(pairs)} layers."
            )
        else:
            self.shares = shares

    def report(
        self,
        names: tuple[str, str] | None,
        metric: Metric | None,
        latency: Latency | None,
        plan: PrecisionPlan | None,
    ) -> Report:
        """Everything measured so far."""
        sizes, reference_sizes = module_bytes(self.model), module_bytes(self.reference)
        for split in self.splits:
            own = split.bytes_by_name()
            if any(reference_sizes[name] for name in own):  # else tied to what comes before
                reference_sizes.update(own)
        name, reference_name = names or (label_of(self.model), label_of(self.reference))
        return Report(
            model=name,
            reference=reference_name,
            output=self.output,
            batches=self.batches,
            rows=self.rows.rows,
            agreement=self.rows.agreement,
            predictions=self.rows.predictions,
            cosine_mean=self.rows.cosine_mean,
            cosine_min=self.rows.cosine_min if self.rows.cosine_count else None,
            sqnr_db=self.noise.sqnr_db,
            max_abs_error=self.noise.max_abs_error,
            nonfinite=self.rows.nonfinite,
            nonfinite_reference=self.rows.nonfinite_reference,
            metric=metric,
            layers=tuple(self._layers(sizes, reference_sizes)),
            bytes=sum(sizes.values()),
            reference_bytes=sum(reference_sizes.values()),
            latency=latency,
            machine=machine_facts(),
            notes=tuple(self._all_notes()),
            plan=plan,
        )

    def _layers(self, sizes: dict[str, int], reference_sizes: dict[str, int]) -> Iterator[Layer]:
        if self.probe is None:
            return
        records = self.probe.records
        never_ran = [n for n in self.probe.reference_layers if n not in records]
        for record in (*records.values(), *map(LayerRecord, never_ran)):
            module = self.probe.model_layers[record.name]
            before = self.probe.reference_layers[record.name]
            yield Layer(
                name=record.name,
                kind=kind_of(module),
                quantized=is_quantized(module),
                calls=record.calls,
                sqnr_db=record.total.sqnr_db,
                own_sqnr_db=record.own.sqnr_db if record.own else None,
                max_abs_error=record.total.max_abs_error,
                nonfinite=record.total.nonfinite,
                bytes=bytes_under(sizes, record.name),
                reference_bytes=bytes_under(reference_sizes, record.name),
                scheme=repr(module.scheme) if isinstance(module, QModule) else None,
                seconds=self.seconds["model"].get(record.name),
                reference_seconds=self.seconds["reference"].get(record.name),
                share=self.shares.get(record.name),
                input_outlier=input_outlier(record.channel_amax),
                weight_outlier=weight_outlier(before),
            )

    def _all_notes(self) -> Iterator[str]:
        yield from self.notes
        left_out = self.call_model.left_out | self.call_reference.left_out
        if left_out:
            yield (
                f"Not passed to the models, because forward has no parameter for it: "
                f"{', '.join(sorted(left_out))}."
            )
        if self.padded:
            yield "Tokens that attention_mask marks as padding are left out."
        if self.rows.nonfinite or self.rows.nonfinite_reference:
            yield (
                f"Output vectors with NaN or Inf: {self.rows.nonfinite} of the model, "
                f"{self.rows.nonfinite_reference} of the reference, of {self.rows.rows}. Cosine, "
                f"SQNR and error leave them out; in the agreement they count against the model."
            )
        if self.probe is None:
            return
        if self.probe.unmatched:
            yield (
                f"{len(self.probe.unmatched)} layers of the reference have no counterpart of the "
                f"same name in the model: {_some(self.probe.unmatched)}."
            )
        never_ran = [n for n in self.probe.reference_layers if n not in self.probe.records]
        if never_ran:
            yield (
                f"{len(never_ran)} layers were not called, or returned no tensor, so their SQNR is "
                f"unknown: {_some(never_ran)}."
            )
        lost = [r.name for r in self.probe.records.values() if r.calls == 0]
        if lost:
            yield f"{len(lost)} layers ran in the reference but not in the model: {_some(lost)}."


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _name_of(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", type(function).__name__)
    return "metric" if name == "<lambda>" else name


def _with_progress(batches: Iterable[T]) -> Iterable[T]:
    """A progress bar on stderr where a person watches."""
    if not sys.stderr.isatty():
        return batches
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(batches, description="comparing", console=console, transient=True)
