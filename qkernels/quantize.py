"""quantize_ and dequantize_: whole models, in place."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from qkernels.nn import QEmbedding, QLinear, QModule
from qkernels.nn.carry import share_hooks
from qkernels.nn.fastpath import settle_fast_paths
from qkernels.nn.storage import packed_parameter
from qkernels.optimize import check_optimizer, search_scales
from qkernels.plan import Step, check_patterns, is_listed, make_plan, own_bytes, tensor_key
from qkernels.schemes import Scheme
from qkernels.summary import ModuleRow, Summary

DEFAULT_IGNORE = ("lm_head",)
# Below this a model is done before a bar could be read.
_BYTES_WORTH_A_BAR = 256 << 20


@torch.inference_mode(False)  # what is made must be usable outside of it
def quantize_(
    model: nn.Module,
    scheme: Scheme | Mapping[str, Scheme],
    ignore: str | Sequence[str] = DEFAULT_IGNORE,
    *,
    optimize: str = "minmax",
    progress: bool | None = None,
) -> Summary:
    """Replace the Linear and Embedding layers of a model by quantized ones, in place.

    Everything is checked before the first layer changes. Layers are then replaced one by one, so
    that memory never exceeds the float model and one layer. Modules that share a weight share one
    packed weight, or stay float together. Patterns, in `scheme` and `ignore`, are shell globs on
    qualified names (`encoder.layers.0.linear1`); `*` crosses dots, a pattern that names a container
    means everything in it, and one without a dot also matches the last part of a name.

    Args:
        model: float model on the CPU. It is changed.
        scheme: one scheme for all layers, or schemes by pattern. Where several patterns match, the
            last one counts, so put general ones first: `{"*": W4A16(), "*.linear2": W8A8()}`.
        ignore: patterns of modules that stay float, whatever `scheme` says. By default "lm_head",
            the output layer of language models, if there is one.
        optimize: how scales are chosen: "minmax" from the extremes of each group, at once, or by a
            search, "mse" or "hqq", which takes seconds and makes 4 bits more accurate; see
            `qk.optimize.search_scales`.
        progress: show a progress bar; by default only for large models on a terminal.

    Returns:
        A summary of every module: what it became, or why it was left.

    Raises:
        TypeError: an argument of another type.
        ValueError: a pattern that matches nothing, a layer that cannot be quantized, or an unknown
            optimize.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> summary = qk.quantize_(model, qk.W8A8(), ignore="2")
        >>> len(summary.converted)
        1
    """
    check_optimizer("quantize_", optimize)
    steps = plan_of("quantize_", model, scheme, ignore)
    done: dict[str, QModule] = {}

    def convert(step: Step) -> None:
        assert step.scheme is not None
        old = model.get_submodule(step.names[0])
        new = quantized_like_float(old, step.scheme, done.get(step.twin or ""), optimize)
        replace_everywhere(model, step.names, old, new)
        done[step.names[0]] = new

    wanted = [step for step in steps if step.scheme is not None]
    with shown_progress("Quantizing", wanted, progress) as advance:
        for step in wanted:
            convert(step)
            advance(step)
    settle_fast_paths(model)
    became = {step.names: f"{_quantized_kind(step)} {step.scheme}" for step in wanted}
    return summary_of(f"{type(model).__name__} quantized", model, steps, became)


def dequantize_(model: nn.Module) -> Summary:
    """Replace the quantized layers of a model by the float layers they compute with, in place.

    Args:
        model: a model that holds quantized layers. It is changed.

    Returns:
        A summary of every module.

    Raises:
        TypeError: not a module.
        ValueError: there is nothing to replace, or the model is itself a quantized layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> _ = qk.quantize_(model, qk.W8A8())
        >>> _ = qk.dequantize_(model)
        >>> model
        Sequential(
          (0): Linear(in_features=64, out_features=64, bias=True)
        )
    """
    _check_model(model, "dequantize_")
    if isinstance(model, QModule):
        raise ValueError(
            f"dequantize_: the model is itself a {type(model).__name__}, which cannot be replaced "
            "in place; use its dequantize()"
        )
    steps = _steps_back(model)
    wanted = [step for step in steps if step.scheme is not None]
    if not wanted:
        raise ValueError(f"dequantize_: {type(model).__name__} holds no quantized layer")
    weights: dict[object, nn.Parameter] = {}
    became = {}
    for step in wanted:
        old = model.get_submodule(step.names[0])
        assert isinstance(old, QLinear | QEmbedding)
        # Layers that share a weight but not what is done to x compute with different float ones.
        names = old.input_transforms if isinstance(old, QLinear) else ()
        transforms = [tensor_key(old.get_buffer(name)) for name in names]
        key = (tensor_key(old.packed), old.dtype, *transforms)
        new = old.dequantize()
        assert isinstance(new.weight, nn.Parameter)
        new.weight = weights.setdefault(key, new.weight)
        replace_everywhere(model, step.names, old, new)
        became[step.names] = type(new).__name__
    settle_fast_paths(model)
    return summary_of(f"{type(model).__name__} dequantized", model, steps, became)


def quantized_like_float(
    module: nn.Module, scheme: Scheme, twin: QModule | None = None, optimize: str = "minmax"
) -> QModule:
    """The quantized module for a float Linear or Embedding.

    Args:
        module: the float module.
        scheme: how to quantize it.
        twin: a quantized module of the same weight, whose packed weight is to be shared.
        optimize: how its scales are chosen.
    """
    made_by: type[QLinear] | type[QEmbedding]
    made_by = QLinear if isinstance(module, nn.Linear) else QEmbedding
    new = made_by.shell(module, scheme)  # type: ignore[arg-type]
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    if twin is None:
        new.packed = packed_parameter(search_scales(weight, scheme, optimize), scheme)
    else:
        new.packed = twin.packed
    return new


def replace_everywhere(
    model: nn.Module, names: Sequence[str], old: nn.Module, new: nn.Module
) -> None:
    """Put a module in the place of another, under all of its names, with its hooks.

    Args:
        model: holds the old module.
        names: all qualified names of the old module in the model.
        old: the module that goes.
        new: the module that comes.
    """
    share_hooks(old, new)
    if isinstance(new, QModule):
        new.qualified_name = names[0]
    for name in names:
        model.set_submodule(name, new)


def _quantized_kind(step: Step) -> str:
    return "QEmbedding" if step.kind == "Embedding" else "QLinear"


def _steps_back(model: nn.Module) -> list[Step]:
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_listed(module):
            names.setdefault(id(module), []).append(name)
    seen: set[object] = set()
    steps = []
    for found in names.values():
        module = model.get_submodule(found[0])
        scheme = module.scheme if isinstance(module, QModule) else None
        steps.append(
            Step(
                names=tuple(found),
                kind=type(module).__name__,
                scheme=scheme,
                note="" if scheme else "was not quantized",
                twin=None,
                nbytes=own_bytes(module, seen),
            )
        )
    return steps


def plan_of(
    op: str,
    model: nn.Module,
    scheme: Scheme | Mapping[str, Scheme],
    ignore: str | Sequence[str],
) -> list[Step]:
    """Check the arguments that all conversions of a model take, and decide about every module.

    Args:
        op: the function that was called, for messages.
        model: the model to be converted; nothing is changed.
        scheme: one scheme, or schemes by pattern.
        ignore: patterns of modules to leave.

    Raises:
        TypeError: an argument of another type.
        ValueError: what `quantize_` refuses.
    """
    _check_model(model, op)
    schemes = _schemes_by_pattern(op, scheme)
    patterns = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{op}: ignore is {ignore!r}; expected patterns of module names")
    if isinstance(scheme, Mapping):
        check_patterns(model, schemes, "scheme")
    if patterns != DEFAULT_IGNORE:
        check_patterns(model, patterns, "ignore")
    if isinstance(model, nn.Linear | nn.Embedding):
        kind = "Linear" if isinstance(model, nn.Linear) else "Embedding"
        raise ValueError(
            f"{op}: the model is itself a {type(model).__name__}, which cannot be replaced in "
            f"place; use Q{kind}.from_float(model, scheme), or put it into an nn.Sequential"
        )
    return make_plan(model, schemes, patterns)


def _check_model(model: nn.Module, op: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model is {type(model).__name__}; expected a torch.nn.Module")
    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            f"{op}: the model is wrapped in DistributedDataParallel, which holds on to its "
            "parameters; convert the model first and wrap it then"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"{op}: the model is a ScriptModule, whose layers are compiled in; convert the Python "
            "model and use torch.compile or torch.export on that"
        )


def _schemes_by_pattern(op: str, scheme: Scheme | Mapping[str, Scheme]) -> dict[str, Scheme]:
    schemes = dict(scheme) if isinstance(scheme, Mapping) else {"*": scheme}
    for pattern, value in schemes.items():
        if not isinstance(pattern, str) or not isinstance(value, Scheme):
            raise TypeError(
                f"{op}: scheme is {scheme!r}; expected a scheme like qk.W8A8(), or a dict "
                "from patterns of module names to schemes"
            )
    if not schemes:
        raise ValueError(f"{op}: scheme is an empty dict; expected at least one pattern")
    return schemes


def summary_of(
    title: str,
    model: nn.Module,
    steps: list[Step],
    became: Mapping[tuple[str, ...], str],
    quality: Mapping[str, tuple[float, float]] = MappingProxyType({}),
    notes: Mapping[str, str] = MappingProxyType({}),
) -> Summary:
    """What became of every module.

    Args:
        title: what was done.
        model: as it is now.
        steps: the decisions, in order.
        became: what modules are now, by their names.
        quality: by first name, SQNR in dB of a layer rounded to nearest and as it is.
        notes: by first name, what happened to a layer on the way.
    """
    seen: set[object] = set()
    rows = []
    for step in steps:
        name = step.names[0]
        module = model.get_submodule(name)
        nearest, now = quality.get(name, (None, None))
        others = ", ".join(step.names[1:])
        also = f"also known as {others}" if others else ""
        rows.append(
            ModuleRow(
                name=name,
                kind=step.kind,
                became=became.get(step.names),
                note="; ".join(part for part in (step.note, notes.get(name, ""), also) if part),
                bytes_before=step.nbytes,
                bytes_after=own_bytes(module, seen),
                sqnr_nearest=nearest,
                sqnr=now,
            )
        )
    return Summary(title, tuple(rows))


@contextmanager
def shown_progress(
    what: str, steps: list[Step], wanted: bool | None
) -> Iterator[Callable[[Step], None]]:
    total = sum(step.nbytes for step in steps)
    if wanted is None:
        wanted = total >= _BYTES_WORTH_A_BAR and sys.stderr.isatty()
    if not wanted:
        yield lambda step: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)

        def advance(step: Step) -> None:
            bar.update(task, advance=step.nbytes, description=f"{what} {step.names[0]}")

        yield advance
