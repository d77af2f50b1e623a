"""quantize_ and dequantize_: whole models, in place."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from qkernels.nn import QEmbedding, QLinear, QModule
from qkernels.nn.carry import share_hooks
from qkernels.nn.fastpath import settle_fast_paths
from qkernels.nn.storage import packed_parameter, quantize_weight
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
        progress: show a progress bar; by default only for large models on a terminal.

    Returns:
        A summary of every module: what it became, or why it was left.

    Raises:
        TypeError: an argument of another type.
        ValueError: a pattern that matches nothing, or a layer that cannot be quantized.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> summary = qk.quantize_(model, qk.W8A8(), ignore="2")
        >>> len(summary.converted)
        1
    """
    check_model(model, "quantize_")
    schemes = _schemes_by_pattern(scheme)
    patterns = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"quantize_: ignore is {ignore!r}; expected patterns of module names")
    if isinstance(scheme, Mapping):
        check_patterns(model, schemes, "scheme")
    if patterns != DEFAULT_IGNORE:
        check_patterns(model, patterns, "ignore")
    if isinstance(model, nn.Linear | nn.Embedding):
        kind = "Linear" if isinstance(model, nn.Linear) else "Embedding"
        raise ValueError(
            f"quantize_: the model is itself a {type(model).__name__}, which cannot be replaced in "
            f"place; use Q{kind}.from_float(model, scheme)"
        )
    steps = make_plan(model, schemes, patterns)
    done: dict[str, QModule] = {}

    def convert(step: Step) -> None:
        assert step.scheme is not None
        old = model.get_submodule(step.names[0])
        new = quantized_like_float(old, step.scheme, done.get(step.twin or ""))
        replace_everywhere(model, step.names, old, new)
        done[step.names[0]] = new

    wanted = [step for step in steps if step.scheme is not None]
    with _progress("Quantizing", wanted, progress) as advance:
        for step in wanted:
            convert(step)
            advance(step)
    settle_fast_paths(model)
    became = {step.names: f"{_quantized_kind(step)} {step.scheme}" for step in wanted}
    return _summary(f"{type(model).__name__} quantized", model, steps, became)


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
    check_model(model, "dequantize_")
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
        key = (tensor_key(old.packed), old.dtype)
        new = old.dequantize()
        assert isinstance(new.weight, nn.Parameter)
        new.weight = weights.setdefault(key, new.weight)
        replace_everywhere(model, step.names, old, new)
        became[step.names] = type(new).__name__
    settle_fast_paths(model)
    return _summary(f"{type(model).__name__} dequantized", model, steps, became)


def quantized_like_float(module: nn.Module, scheme: Scheme, twin: QModule | None = None) -> QModule:
    """The quantized module for a float Linear or Embedding.

    Args:
        module: the float module.
        scheme: how to quantize it.
        twin: a quantized module of the same weight, whose packed weight is to be shared.
    """
    made_by: type[QLinear] | type[QEmbedding]
    made_by = QLinear if isinstance(module, nn.Linear) else QEmbedding
    new = made_by.shell(module, scheme)  # type: ignore[arg-type]
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    if twin is None:
        new.packed = packed_parameter(quantize_weight(weight, scheme), scheme)
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


def check_model(model: nn.Module, op: str) -> None:
    """Refuse what cannot be converted in place.

    Args:
        model: given by the user.
        op: the function that was called, for errors.

    Raises:
        TypeError: not a module.
        ValueError: a wrapper that holds on to the parameters, or a ScriptModule.
    """
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


def _schemes_by_pattern(scheme: Scheme | Mapping[str, Scheme]) -> dict[str, Scheme]:
    schemes = dict(scheme) if isinstance(scheme, Mapping) else {"*": scheme}
    for pattern, value in schemes.items():
        if not isinstance(pattern, str) or not isinstance(value, Scheme):
            raise TypeError(
                f"quantize_: scheme is {scheme!r}; expected a scheme like qk.W8A8(), or a dict "
                "from patterns of module names to schemes"
            )
    if not schemes:
        raise ValueError("quantize_: scheme is an empty dict; expected at least one pattern")
    return schemes


def _summary(
    title: str, model: nn.Module, steps: list[Step], became: dict[tuple[str, ...], str]
) -> Summary:
    seen: set[object] = set()
    rows = []
    for step in steps:
        module = model.get_submodule(step.names[0])
        others = ", ".join(step.names[1:])
        also = f"also known as {others}" if others else ""
        rows.append(
            ModuleRow(
                name=step.names[0],
                kind=step.kind,
                became=became.get(step.names),
                note="; ".join(part for part in (step.note, also) if part),
                bytes_before=step.nbytes,
                bytes_after=own_bytes(module, seen),
            )
        )
    return Summary(title, tuple(rows))


@contextmanager
def _progress(
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
