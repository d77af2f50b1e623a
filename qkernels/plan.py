"""What quantize_ and prepare_qat_ will do to each module, decided before anything is touched."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qkernels.calibration.use import what_to_note, why_no_range
from qkernels.nn import QModule
from qkernels.nn.attention import QMultiheadAttention, why_not_splittable
from qkernels.nn.carry import why_not_quantizable, why_not_replaceable
from qkernels.nn.kinds import QUANTIZED, base_of, why_no_kernel
from qkernels.nn.qat import QATModule
from qkernels.nn.sharded import is_sharded
from qkernels.reads import why_parent_needs_float
from qkernels.schemes import Scheme

if TYPE_CHECKING:
    from qkernels.calibration import Calibration

_NO_WEIGHT = "has no weight"


@dataclass(frozen=True)
class Step:
    """The decision about one module. It holds no tensors, so nothing is kept alive by it.

    Args:
        names: all qualified names of the module, the first one first.
        kind: its class.
        scheme: what to quantize it with, or None to leave it.
        note: why it is left, or what else there is to know.
        twin: first name of an earlier module whose packed weight it will share.
        nbytes: bytes of its own tensors, without what earlier modules hold too.
    """

    names: tuple[str, ...]
    kind: str
    scheme: Scheme | None
    note: str
    twin: str | None
    nbytes: int


@dataclass
class _Candidate:
    """A module while the decision about it is being made."""

    module: nn.Module
    names: list[str] = field(default_factory=list)
    scheme: Scheme | None = None
    pattern: str = ""
    note: str = ""
    twin: str | None = None


def make_plan(
    model: nn.Module,
    schemes: Mapping[str, Scheme],
    ignore: tuple[str, ...],
    op: str = "quantize_",
    calibration: Calibration | None = None,
) -> list[Step]:
    """Decide about every module.

    Args:
        model: the model to be quantized.
        schemes: scheme by pattern, the last matching one counts.
        ignore: patterns of modules to leave.
        op: the function that was called, for messages; "prepare_qat_" also takes schemes whose
            input ranges are not known yet.
        calibration: ranges for the layers whose scheme is static.

    Raises:
        ValueError: a layer that was asked for cannot be quantized (all such layers are named), or
            nothing is quantized by one of the patterns.
    """
    found: dict[int, _Candidate] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), _Candidate(module)).names.append(name)
    candidates = [c for c in found.values() if is_listed(c.module)]
    for candidate in candidates:
        _choose(candidate, model, schemes, ignore, op)
    _settle_ties(candidates)
    _check_use(candidates, schemes, op)
    reasons = (
        f"{c.names[0]}: {reason}"
        for c in candidates
        if c.scheme is not None and (reason := _why_impossible(c, calibration, op)) is not None
    )
    _refuse(reasons, op)
    for c in candidates:
        if calibration is not None and needs_range(c.module, c.scheme):
            said = what_to_note(calibration, c.names)
            c.note = "; ".join(part for part in (c.note, said) if part)
    seen: set[object] = set()
    return [
        Step(
            names=tuple(c.names),
            kind=type(c.module).__name__,
            scheme=c.scheme,
            note=c.note,
            twin=c.twin,
            nbytes=own_bytes(c.module, seen),
        )
        for c in candidates
    ]


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern names a module or one that contains it.

    Patterns are shell globs (`*`, `?`, `[…]`; `*` also crosses dots), case-sensitive. A pattern
    without a dot may also match the last part of a name. `=` before a name means that module alone.

    Args:
        pattern: the glob, or "=" and a name.
        name: qualified name of the module.

    Example:
        >>> matches("encoder.*.linear1", "encoder.layers.0.linear1")
        True
        >>> matches("lm_head", "model.lm_head"), matches("encoder", "encoder.layers.0")
        (True, True)
        >>> matches("=0", "0"), matches("=0", "encoder.0")
        (True, False)
    """
    if pattern.startswith("="):
        return name == pattern[1:]
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if fnmatch.fnmatchcase(".".join(parts[:end]), pattern):
            return True
        if "." not in pattern and fnmatch.fnmatchcase(parts[end - 1], pattern):
            return True
    return False


def check_model(model: object, op: str) -> None:
    """Refuse what has no layers that could be watched or replaced.

    Args:
        model: what was given as the model.
        op: what to name in the message.

    Raises:
        TypeError: not a module.
        ValueError: a module that wraps others out of reach.
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


def check_patterns(
    model: nn.Module,
    patterns: Iterable[str],
    argument: str,
    *,
    op: str = "quantize_",
    names: Sequence[str] | None = None,
) -> None:
    """Refuse patterns that name nothing.

    Args:
        model: where the names come from.
        patterns: globs, see `matches`.
        argument: what the patterns were given as.
        op: the function that was called.
        names: what may be named, instead of the modules.

    Raises:
        ValueError: a pattern matches no module; names the nearest names.
    """
    what = "module" if names is None else "module or parameter"
    if names is None:
        names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            known = list(dict.fromkeys([*names, *(name.rpartition(".")[2] for name in names)]))
            near = get_close_matches(pattern, known, n=3, cutoff=0.5)
            hint = f"; near it are {', '.join(map(repr, near))}" if near else ""
            raise ValueError(
                f"{op}: {argument} names {pattern!r}, which matches no {what}{hint}. Patterns are "
                "shell globs on names as in model.named_modules()"
            )


def is_listed(module: nn.Module) -> bool:
    """Whether a summary has a row for a module: it holds tensors or has no children."""
    has_tensors = bool(module._parameters or module._buffers)
    return has_tensors or next(module.children(), None) is None


def tensor_key(tensor: Tensor) -> object:
    """The same for two tensors if they are the same elements of the same memory."""
    if tensor.is_meta or tensor.numel() == 0 or is_sharded(tensor):
        return id(tensor)
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)


def own_bytes(module: nn.Module, seen: set[object]) -> int:
    """Bytes of a module's own tensors, without those in `seen`, which gets them added.

    Args:
        module: its children are not counted.
        seen: keys of tensors that have been counted already.
    """
    total = 0
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is None or nn.parameter.is_lazy(tensor):
            continue
        key = tensor_key(tensor)
        if key not in seen:
            seen.add(key)
            total += tensor.nbytes
    return total


def _choose(
    candidate: _Candidate,
    model: nn.Module,
    schemes: Mapping[str, Scheme],
    ignore: tuple[str, ...],
    op: str,
) -> None:
    module, names = candidate.module, candidate.names
    reason = _why_left(module, op) or why_parent_needs_float(model, names)
    ignored = [p for p in ignore if any(matches(p, name) for name in names)]
    wanted = [p for p in schemes if any(matches(p, name) for name in names)]
    if reason is not None:
        candidate.note = reason
    elif ignored:
        candidate.note = f"ignored by {ignored[-1]!r}"
    elif not wanted:
        candidate.note = "no pattern names it"
    else:
        scheme = schemes[wanted[-1]]
        if isinstance(module, nn.modules.conv._ConvNd):
            candidate.note = why_no_kernel(module, scheme) or ""
        if not candidate.note:
            candidate.pattern = wanted[-1]
            candidate.scheme = scheme


def _why_left(module: nn.Module, op: str) -> str | None:
    kind = type(module)
    if isinstance(module, QModule):
        return f"already quantized with {module.scheme}"
    if isinstance(module, QATModule):
        return f"prepared for {module.scheme}; convert_ quantizes it"
    if kind.__module__.startswith("torch.ao."):
        return "a module of torch.ao, whose weight is quantized in a way of its own"
    if not (module._parameters or module._buffers):
        return _NO_WEIGHT
    if op == "prepare_qat_" and isinstance(module, nn.modules.conv._ConvTransposeNd):
        return f"no QAT{kind.__name__} in this version"
    if kind in QUANTIZED:
        return why_not_replaceable(module)
    base = base_of(module)
    if base is not None:
        return why_not_replaceable(module) or (
            f"a subclass of nn.{base.__name__}, whose own code would be lost; if that is none, "
            f"replace it by hand with {QUANTIZED[base].__name__}.from_float"
        )
    if isinstance(module, nn.MultiheadAttention):
        return why_not_splittable(module) or (
            "keeps its input projections as bare parameters; call qk.split_attention_(model) first"
            if op == "prepare_qat_"
            else "code around it reads its in_proj_weight"
        )
    if isinstance(module, QMultiheadAttention):
        return "only its projections are quantized"
    return f"no quantized {kind.__name__} in this version"


def needs_range(module: nn.Module, scheme: Scheme | None) -> bool:
    """Whether a module can only be quantized with a range of its input that was measured."""
    return scheme is not None and scheme.static and not isinstance(module, nn.Embedding)


def _why_impossible(candidate: _Candidate, calibration: Calibration | None, op: str) -> str | None:
    module, scheme = candidate.module, candidate.scheme
    assert scheme is not None
    trains = op == "prepare_qat_"
    if trains and isinstance(module, nn.modules.conv._ConvNd) and scheme.group_size != -1:
        return (
            f"{scheme} cuts rows into groups, but a convolution that trains has one scale for each "
            "output channel; give convolutions a scheme with group_size=-1 by a pattern of their "
            "own"
        )
    if not trains and needs_range(module, scheme):
        no_range = why_no_range(calibration, candidate.names, scheme)
        if no_range is not None:
            return no_range
    return why_no_kernel(module, scheme) or why_not_quantizable(_weight(module))


def _weight(module: nn.Module) -> Tensor:
    weight = module._parameters["weight"]
    assert weight is not None
    return weight


def _settle_ties(candidates: list[_Candidate]) -> None:
    """Modules that share a weight share its packed form, or stay float together."""
    holders: dict[object, list[_Candidate]] = {}
    for candidate in candidates:
        for parameter in candidate.module._parameters.values():
            if parameter is not None and not nn.parameter.is_lazy(parameter):
                holders.setdefault(tensor_key(parameter), []).append(candidate)
    for key, tied in holders.items():
        quantized = [c for c in tied if c.scheme and tensor_key(_weight(c.module)) == key]
        float_ones = [c for c in tied if c not in quantized]
        for i, candidate in enumerate(quantized):
            if float_ones:
                other = float_ones[0]
                candidate.scheme = None
                candidate.note = (
                    f"shares its weight with {other.names[0]}, which stays float: {other.note}"
                )
            elif i:
                _share(candidate, quantized[:i])


def _share(candidate: _Candidate, earlier: list[_Candidate]) -> None:
    assert candidate.scheme is not None
    for other in earlier:
        if not (other.scheme and not other.twin and _packs_alike(other.module, candidate.module)):
            continue
        if other.scheme.shares_weight_with(candidate.scheme):
            candidate.twin = other.names[0]
            candidate.note = f"shares its weight with {candidate.twin}"
            return
    candidate.note = (
        f"no longer shares its weight with {earlier[0].names[0]}: the schemes store it differently"
    )


def _packs_alike(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules of one float weight also have one packed weight."""
    convolution = nn.modules.conv._ConvNd
    if not isinstance(a, convolution) or not isinstance(b, convolution):
        return not isinstance(a, convolution) and not isinstance(b, convolution)
    return type(a) is type(b) and a.groups == b.groups


def _check_use(candidates: list[_Candidate], schemes: Mapping[str, Scheme], op: str) -> None:
    """Refuse patterns by which nothing is quantized."""
    for pattern in schemes:
        named = [c for c in candidates if any(matches(pattern, name) for name in c.names)]
        if any(c.scheme is not None and c.pattern == pattern for c in named):
            continue
        overridden = [c for c in named if c.scheme is not None]
        if overridden:
            raise ValueError(
                f"{op}: pattern {pattern!r} has no effect, since {overridden[0].pattern!r} "
                "comes later and the last match counts; put the more general pattern first"
            )
        reasons = [f"{c.names[0]} ({type(c.module).__name__}): {c.note}" for c in named]
        with_weight = [r for r in reasons if not r.endswith(_NO_WEIGHT)] or reasons
        more = f"; and {len(with_weight) - 4} more" if len(with_weight) > 4 else ""
        raise ValueError(
            f"{op}: nothing that {pattern!r} matches can be quantized: "
            f"{'; '.join(with_weight[:4])}{more}"
        )


def _refuse(reasons: Iterable[str], op: str) -> None:
    lines = list(reasons)
    if lines:
        count = "a layer" if len(lines) == 1 else f"{len(lines)} layers"
        raise ValueError(
            f"{op} cannot quantize {count}, and has changed nothing: {'; '.join(lines)}. "
            f"Name {'it' if len(lines) == 1 else 'them'} in ignore to leave float what cannot be "
            "quantized"
        )
