"""lower: a float CNN as a model whose layers hand each other int8 codes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from qkernels.calibrate import observer_factory, progress_bar
from qkernels.calibration import Calibration, Observer
from qkernels.lowering.capture import capture
from qkernels.lowering.emit import Emitter
from qkernels.lowering.model import LoweredModel
from qkernels.lowering.names import Names, module_of
from qkernels.lowering.nodes import Constants
from qkernels.lowering.plan import make_plan
from qkernels.lowering.program import Program
from qkernels.lowering.ranges import CalibratedRanges, Ranges, WatchedRanges
from qkernels.lowering.rows import summary_rows
from qkernels.lowering.units import find_units
from qkernels.plan import check_model, check_patterns, matches
from qkernels.quantize import ignored_patterns
from qkernels.schemes import W8A8, Scheme
from qkernels.summary import Summary

_DEFAULT_SCHEME = W8A8(static=True, activation="asymmetric")


@torch.inference_mode(False)  # what is made must be usable outside of it
def lower(
    model: nn.Module,
    example_inputs: Any,
    *,
    batches: Iterable[Any] | None = None,
    calibration: Calibration | None = None,
    scheme: Scheme = _DEFAULT_SCHEME,
    observer: str | Callable[[], Observer] = "mse",
    ignore: str | Sequence[str] = (),
    dynamic_shapes: Any = None,
    progress: bool | None = None,
) -> LoweredModel:
    """A model whose layers hand each other int8 codes, made from a float CNN.

    The float model is exported as a graph (`torch.export`). Each convolution and Linear becomes one
    call of the int8 convolution, together with the BatchNorm, addition and activation function
    behind it, and with the rounding to the next layer's codes. Pooling, additions, concatenations
    and functions of one number work on codes; reshapes and slices pass them on. What has no integer
    form stays float, with codes turned to numbers before it and back behind it. The summary lists
    every op: what it became, or why it stayed.

    Args:
        model: float model on the CPU. It is not changed, and shares nothing with the result.
        example_inputs: one batch, for the graph: a tensor, a tuple of arguments, or a mapping of
            keyword arguments. The result takes arguments in the same way and of the same shapes;
            the first dimension may vary.
        batches: data like that to come, each as `example_inputs`. All ranges are measured on it.
        calibration: instead of batches, what `qk.calibrate` returned for this model. It knows what
            layers read; a value that none of its layers reads or gives stays float.
        scheme: `W8A8(static=True)`; by default with asymmetric activations, which spend no codes on
            values that never come.
        observer: what chooses ranges from batches, as for `calibrate`.
        ignore: patterns of modules to leave float, as for `quantize_`.
        dynamic_shapes: which sizes may vary, as `torch.export.export` takes it.
        progress: show a progress bar; by default on a terminal.

    Returns:
        The lowered model, for inference. Its `summary` says what was done.

    Raises:
        TypeError: an argument of another type.
        ValueError: neither batches nor calibration or both, a scheme that is not static W8A8, a
            model that `torch.export` cannot capture, or one without a layer to lower.

    Example:
        >>> model = nn.Sequential(
        ...     nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)
        ... )
        >>> x = torch.randn(2, 3, 16, 16)
        >>> lowered = qk.lower(model, x, batches=[x])
        >>> [(row.name, row.became) for row in lowered.summary][:3]
        [('0', 'int8 convolution'), ('1', 'part of 0'), ('2', 'part of 0')]
        >>> lowered(torch.randn(7, 3, 16, 16)).shape
        torch.Size([7, 4, 12, 12])
    """
    _check(model, batches, calibration, scheme)
    patterns = ignored_patterns(ignore, "lower")
    check_patterns(model, patterns, "ignore", op="lower")
    make = observer_factory(observer, "lower")
    captured = capture(model, example_inputs, dynamic_shapes)
    graph = captured.module.graph

    def why_left(node: fx.Node) -> str | None:
        name, _ = module_of(node)
        ignored = [pattern for pattern in patterns if matches(pattern, name)]
        return f"ignored by {ignored[-1]!r}" if ignored else None

    units, reasons = find_units(graph, Constants(captured.module), why_left)
    ranges: Ranges
    if calibration is None:
        assert batches is not None
        ranges = WatchedRanges(captured, batches, make, lambda given: progress_bar(given, progress))
    else:
        ranges = CalibratedRanges(graph, calibration, lambda node: module_of(node)[0])
    plan, more = make_plan(graph, units, ranges.has)
    reasons |= more
    if not plan.units:
        raise ValueError(
            f"lower: {type(model).__name__} has no convolution or Linear that can compute in "
            f"integers: {'; '.join(sorted(set(reasons.values()))) or 'there is none'}"
        )
    found = ranges.find(plan.quantized(), scheme.activation == "symmetric")
    leaves = {name for name, m in model.named_modules() if next(m.children(), None) is None}
    names = Names(leaves)
    emitter = Emitter(captured.module, plan, found, scheme, names)
    emitter.run()
    program = Program.of(captured.signature, emitter.graph, emitter.modules, emitter.tensors)
    rows = summary_rows(captured.module, plan, reasons, emitter, names)
    summary = Summary(f"{type(model).__name__} lowered to {scheme}", rows)
    return LoweredModel(program, emitter.modules, emitter.tensors, summary)


def _check(model: object, batches: object, calibration: object, scheme: object) -> None:
    check_model(model, "lower")
    assert isinstance(model, nn.Module)
    if any(parameter.dtype == torch.float64 for parameter in model.parameters()):
        raise ValueError(
            f"lower: {type(model).__name__} has float64 parameters; expected float32, bfloat16 or "
            "float16, so call model.float() first"
        )
    if (batches is None) == (calibration is None):
        given = "neither" if batches is None else "both"
        raise ValueError(
            f"lower: {given} of batches and calibration is given; expected one of them: batches of "
            "example data, or what qk.calibrate(model, batches) returned"
        )
    if calibration is not None and not isinstance(calibration, Calibration):
        raise TypeError(
            f"lower: calibration is {type(calibration).__name__}; expected what "
            "qk.calibrate(model, batches) returns; data goes into batches="
        )
    if batches is not None and (
        isinstance(batches, torch.Tensor | Mapping) or not isinstance(batches, Iterable)
    ):
        raise TypeError(
            f"lower: batches must be an iterable of batches, got one {type(batches).__name__}; "
            "pass [batch]"
        )
    if not isinstance(scheme, Scheme):
        raise TypeError(f"lower: scheme is {scheme!r}; expected qk.W8A8(static=True)")
    if not (isinstance(scheme, W8A8) and scheme.static and scheme.group_size == -1):
        raise ValueError(
            f"lower: scheme is {scheme}; expected qk.W8A8(static=True), with symmetric or "
            "asymmetric activations and one scale for each output channel: codes between layers "
            "need int8 and ranges that are known"
        )
