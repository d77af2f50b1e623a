"""Quantization-aware training: prepare_qat_, convert_, and what is switched in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qkernels import functional
from qkernels.nn import QModule
from qkernels.nn.batchnorm import pairs_to_fold
from qkernels.nn.carry import why_not_quantizable
from qkernels.nn.conv import QConvNd
from qkernels.nn.kinds import quantized_from_shell, why_no_kernel
from qkernels.nn.linear import why_too_long
from qkernels.nn.observer import InputRange
from qkernels.nn.parents import replace_everywhere, settle_parents
from qkernels.nn.qat import (
    QATConv1d,
    QATConv2d,
    QATConv3d,
    QATConvolution,
    QATEmbedding,
    QATLinear,
    QATModule,
)
from qkernels.nn.ranges import set_range
from qkernels.plan import Step, check_model, check_patterns, make_plan, tensor_key
from qkernels.quantize import (
    DEFAULT_IGNORE,
    ignored_patterns,
    schemes_by_pattern,
    steps_back,
    summary_of,
)
from qkernels.schemes import Scheme
from qkernels.summary import Summary

__all__ = [
    "Schedule",
    "convert_",
    "disable",
    "enable",
    "freeze_observers",
    "learned_parameters",
    "prepare_qat_",
]

_KINDS: tuple[type[QATModule], ...] = (
    QATLinear,
    QATEmbedding,
    QATConv1d,
    QATConv2d,
    QATConv3d,
)


@torch.inference_mode(False)  # what is made must be usable outside of it
def prepare_qat_(
    model: nn.Module,
    scheme: Scheme | Mapping[str, Scheme],
    ignore: str | Sequence[str] = DEFAULT_IGNORE,
    *,
    learn_scale: bool = False,
) -> Summary:
    """Make the layers of a model train for quantization, in place: QAT.

    Linear, Embedding, Conv1d, Conv2d and Conv3d layers then compute in float on values that have
    been quantized and dequantized, and gradients pass straight through (Jacob et al., 2018). Their
    parameters stay the same objects under the same names, so optimizers that hold them and float
    checkpoints go on working. A batch normalization that follows a convolution is folded into the
    weight that is quantized. `convert_` ends it.

    Args:
        model: float model. It is changed.
        scheme: one scheme for all layers, or schemes by pattern, as for `quantize_`. A static one
            observes the ranges of inputs while it trains. Convolutions need group_size=-1.
        ignore: patterns of modules that stay as they are.
        learn_scale: train scales and zero points, too (LSQ: Esser et al., "Learned Step Size
            Quantization", 2020; LSQ+: Bhalgat et al., 2020). They are new parameters, so make the
            optimizer afterwards; see `learned_parameters`. By default scales follow the weights.

    Returns:
        A summary of every module: what it became, or why it was left.

    Raises:
        TypeError: an argument of another type.
        ValueError: a pattern that matches nothing, or a layer that cannot be prepared.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> summary = qk.prepare_qat_(model, qk.W4A8(group_size=32))
        >>> [row.became for row in summary.converted]
        ['QATLinear W4A8(group_size=32)', 'QATLinear W4A8(group_size=32)']
    """
    op = "prepare_qat_"
    check_model(model, op)
    schemes = schemes_by_pattern(scheme, op)
    patterns = ignored_patterns(ignore, op)
    if not isinstance(learn_scale, bool):
        raise TypeError(f"{op}: learn_scale is {learn_scale!r}; expected True or False")
    if isinstance(scheme, Mapping):
        check_patterns(model, schemes, "scheme", op=op)
    if patterns != DEFAULT_IGNORE:
        check_patterns(model, patterns, "ignore", op=op)
    kind = next((k for k in _KINDS if isinstance(model, k.float_type)), None)
    if kind is not None:
        raise ValueError(
            f"{op}: the model is itself a {type(model).__name__}, which cannot be replaced in "
            f"place; use qkernels.nn.{kind.__name__}.from_float(model, scheme)"
        )
    steps = make_plan(model, schemes, patterns, op)
    pairs = pairs_to_fold(model)
    done: dict[str, QATModule] = {}
    became = {}
    for step in steps:
        if step.scheme is None:
            continue
        old = model.get_submodule(step.names[0])
        made_by = next(k for k in _KINDS if isinstance(old, k.float_type))
        new = made_by.from_float(old, step.scheme, learn_scale=learn_scale)
        if step.twin is not None:
            new.weight_scale = done[step.twin].weight_scale
            new.weight_zero_point = done[step.twin].weight_zero_point
        replace_everywhere(model, step.names, old, new)
        done[step.names[0]] = new
        became[step.names] = f"{made_by.__name__} {step.scheme}"
        if isinstance(new, QATConvolution) and id(old) in pairs:
            new.fold(pairs[id(old)])
            became[step.names] += ", folds the batch normalization after it"
    settle_parents(model)
    return summary_of(f"{type(model).__name__} prepared", model, steps, became)


@torch.inference_mode(False)  # what is made must be usable outside of it
def convert_(model: nn.Module) -> Summary:
    """Quantize a model that `prepare_qat_` prepared, in place.

    Linear and Embedding layers become quantized ones whose codes are, to the bit, those that
    training saw. Convolutions become float ones with the values that training saw, for want of a
    quantized convolution. Everything is checked before the first layer changes.

    Args:
        model: a prepared model on the CPU. It is changed.

    Returns:
        A summary of every module.

    Raises:
        TypeError: not a module.
        ValueError: nothing was prepared, the model is itself a prepared layer, or a layer has no
            usable range or weight.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        >>> _ = qk.prepare_qat_(model, qk.W8A8())
        >>> [row.became for row in qk.convert_(model).converted]
        ['QLinear W8A8()']
    """
    op = "convert_"
    check_model(model, op)
    if isinstance(model, QATModule):
        raise ValueError(
            f"{op}: the model is itself a {type(model).__name__}, which cannot be replaced in "
            "place; put it into an nn.Sequential first"
        )
    steps = steps_back(model, QATModule, "was not prepared")
    steps = [step for step in steps if step.kind != InputRange.__name__]  # goes with its layer
    wanted = [step for step in steps if step.scheme is not None]
    if not wanted:
        raise ValueError(
            f"{op}: {type(model).__name__} holds no layer that prepare_qat_ has prepared"
        )
    _check_convertible(model, wanted)
    packed: dict[object, nn.Parameter] = {}
    became = {}
    folded: list[tuple[nn.Module, str]] = []
    for step in wanted:
        old = _prepared(model, step)
        if isinstance(old, QATConvolution):
            folded += [(norm, step.names[0]) for norm in old.batchnorm]
        new = _converted(old, packed)
        replace_everywhere(model, step.names, old, new)
        became[step.names] = (
            f"{type(new).__name__} {step.scheme}"
            if isinstance(new, QModule)
            else f"float {type(new).__name__} with the values of {step.scheme}"
        )
    for norm, into in folded:
        step = next(s for s in steps if model.get_submodule(s.names[0]) is norm)
        replace_everywhere(model, step.names, norm, nn.Identity())
        became[step.names] = f"Identity, folded into {into}"
    settle_parents(model)
    return summary_of(f"{type(model).__name__} converted", model, steps, became)


def _prepared(model: nn.Module, step: Step) -> QATModule:
    module = model.get_submodule(step.names[0])
    assert isinstance(module, QATModule)
    return module


def _check_convertible(model: nn.Module, steps: list[Step]) -> None:
    reasons = []
    for step in steps:
        module = _prepared(model, step)
        reason = why_not_quantizable(module.weight) or module.why_not_convertible()
        if reason is None and isinstance(module, QATLinear):
            reason = why_too_long(module.in_features, module.scheme)
        if reason is not None:
            reasons.append(f"{step.names[0]}: {reason}")
    if reasons:
        count = "a layer" if len(reasons) == 1 else f"{len(reasons)} layers"
        raise ValueError(
            f"convert_ cannot quantize {count}, and has changed nothing: {'; '.join(reasons)}"
        )


def _converted(module: QATModule, packed: dict[object, nn.Parameter]) -> nn.Module:
    """What a prepared module becomes; modules that share a weight share its packed form."""
    plain = module.to_float()
    if why_no_kernel(plain, module.scheme) is not None:
        return plain  # a convolution without a kernel for the scheme
    new = quantized_from_shell(plain, module.scheme)
    if module.input_range is not None:
        set_range(new, *module.input_range.stored())
    key = (
        tensor_key(module.weight),
        None if module.weight_scale is None else tensor_key(module.weight_scale),
        module.scheme.layout_on(module.weight.device.type),
        module.scheme.group_size,
    )
    if key not in packed:
        weight = module.quantized_weight()
        if isinstance(new, QConvNd):
            # The same codes in the order of the quantized convolution: the float one holds their
            # values.
            matrix = new.matrix_of(plain).detach().float()
            given = (weight.scale, weight.zero_point, weight.format, weight.group_size)
            weight = functional.quantize_with(matrix, *given)
        packed[key] = new.packing.parameter(weight)
    new.packed = packed[key]
    return new


# ---- While it trains -----------------------------------------------------------------------------


def _modules(model: nn.Module, op: str) -> list[QATModule]:
    found = [module for module in model.modules() if isinstance(module, QATModule)]
    if not found:
        raise ValueError(
            f"{op}: {type(model).__name__} holds no layer that prepare_qat_ has prepared"
        )
    return found


def enable(model: nn.Module) -> None:
    """Let prepared layers quantize, as they do unless `disable` was called.

    Args:
        model: a prepared model, also one that is wrapped for distributed training.

    Raises:
        ValueError: nothing was prepared.
    """
    for module in _modules(model, "enable"):
        module.quantizing = True


def disable(model: nn.Module) -> None:
    """Let prepared layers compute in float, while static ones go on observing their inputs.

    Args:
        model: a prepared model, also one that is wrapped for distributed training.

    Raises:
        ValueError: nothing was prepared.
    """
    for module in _modules(model, "disable"):
        module.quantizing = False


def freeze_observers(model: nn.Module) -> None:
    """Keep the ranges of static inputs as they are; learned ones are trained from there on.

    Args:
        model: a prepared model, also one that is wrapped for distributed training.

    Raises:
        ValueError: nothing was prepared.
    """
    for module in _modules(model, "freeze_observers"):
        if module.input_range is not None:
            module.input_range.observing = False


def learned_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The scales and zero points that train, each once.

    Optimizers like Adam, whose steps do not shrink with the gradient, want a smaller learning rate
    and no weight decay for them.

    Args:
        model: a prepared model.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 8))
        >>> _ = qk.prepare_qat_(model, qk.W4A16(group_size=32), learn_scale=True)
        >>> scales = qk.qat.learned_parameters(model)
        >>> rest = [p for p in model.parameters() if all(p is not s for s in scales)]
        >>> groups = [{"params": rest}, {"params": scales, "lr": 1e-5, "weight_decay": 0}]
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-4)
    """
    found = {
        id(parameter): parameter
        for module in _modules(model, "learned_parameters")
        for parameter in module.learned_parameters()
    }
    return list(found.values())


class Schedule:
    """Switches fake quantization on, and observers off, after so many steps.

    Args:
        model: a prepared model, also one that is wrapped for distributed training.
        start: steps in float before the layers quantize; observers watch from the beginning.
        freeze: steps after which the ranges of static inputs stand still; None for never.

    Raises:
        ValueError: nothing was prepared, or a number of steps that cannot be.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 8))
        >>> _ = qk.prepare_qat_(model, qk.W8A8(static=True))
        >>> schedule = qk.qat.Schedule(model, start=2, freeze=5)
        >>> for _ in range(10):
        ...     y = model(torch.randn(4, 64))  # and the rest of a training step
        ...     schedule.step()
        >>> model[0].quantizing, model[0].input_range.observing
        (True, False)
    """

    def __init__(self, model: nn.Module, start: int = 0, freeze: int | None = None) -> None:
        if start < 0 or (freeze is not None and freeze < max(start, 1)):
            raise ValueError(
                f"Schedule: start is {start} and freeze is {freeze}; expected 0 <= start <= freeze "
                "and freeze >= 1, so that something is observed"
            )
        self.model = model
        self.start = start
        self.freeze = freeze
        self.steps = 0
        self._apply()

    def step(self) -> None:
        """Count a step; call it after the optimizer's."""
        self.steps += 1
        self._apply()

    def _apply(self) -> None:
        for module in _modules(self.model, "Schedule"):
            module.quantizing = self.steps >= self.start
            if module.input_range is not None:
                module.input_range.observing = self.freeze is None or self.steps < self.freeze

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint needs of it."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint was written.

        Args:
            state: from `state_dict`.
        """
        self.steps = int(state["steps"])
        self._apply()
