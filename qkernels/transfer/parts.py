"""A model as a row of parts, from its input to its head: what transfer learning counts in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from qkernels.nn import QLinear
from qkernels.plan import check_patterns, matches
from qkernels.transfer.adapter import LoRALinear

_CONTAINERS = (nn.ModuleList, nn.Sequential)
# What libraries call the last layer: torchvision, timm and transformers.
_HEAD_NAMES = ("classifier", "classification_head", "fc", "head", "heads", "lm_head", "score")
LINEARS = (nn.Linear, QLinear, LoRALinear)


@dataclass(frozen=True, eq=False)
class Part:
    """Neighbouring modules of a model that train or stay frozen together.

    Args:
        name: qualified name of its first module.
        kind: class of that module.
        parameters: its parameters by qualified name; one that several parts share is in each.
    """

    name: str
    kind: str
    parameters: dict[str, nn.Parameter]


def parts(model: nn.Module) -> list[Part]:
    """The parts of a model from its input to its head, in the order they are registered in.

    The children of a model are its parts. One that holds a ModuleList or Sequential is taken apart
    down to the elements of that, so that each block of an encoder is a part. A part that has no
    matrix, such as a norm, belongs to the one before it. The head comes last.

    Args:
        model: any module.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))
        >>> [part.name for part in parts(mlp)]
        ['0', '3']
    """
    found: list[Part] = []
    for name, module, parameters in _pieces(model, "", inside=False):
        has_matrix = any(p.ndim > 1 for p in parameters.values())
        if found and not has_matrix:
            found[-1].parameters.update(parameters)
        elif parameters:
            found.append(Part(name, type(module).__name__, parameters))
    head = head_name(model)
    for part in found:
        if head is not None and _is_within(head, part.name):
            found.remove(part)
            found.append(part)
            break
    return found


def head_name(model: nn.Module) -> str | None:
    """Qualified name of a model's last linear layer, or None if it has none.

    That is the last one of a child with a customary name (`classifier`, `fc`, `head`, `lm_head`,
    `score` …), or else the last one of all.

    Args:
        model: any module.

    Example:
        >>> head_name(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
        '2'
    """
    linears = [
        name
        for name, module in _outermost(model, LINEARS)
        if name  # a model that is itself a layer has no head
    ]
    named = [name for name in linears if name.split(".")[0] in _HEAD_NAMES]
    found = named or linears
    return found[-1] if found else None


def choose(
    model: nn.Module, patterns: str | Sequence[str], names: Iterable[str], op: str, argument: str
) -> set[str]:
    """The names that patterns choose.

    Args:
        model: where the names come from.
        patterns: shell globs, as `quantize_` takes them.
        names: to choose from.
        op: the function that was called, for errors.
        argument: what the patterns were given as, for errors.

    Raises:
        TypeError: the patterns are not strings.
        ValueError: a pattern matches nothing.
    """
    listed = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if not all(isinstance(pattern, str) for pattern in listed):
        raise TypeError(f"{op}: {argument} is {patterns!r}; expected patterns of names")
    known = list(names)
    check_patterns(model, listed, argument, op=op, names=known)
    return {name for name in known if any(matches(pattern, name) for pattern in listed)}


def _outermost(
    model: nn.Module, kinds: tuple[type[nn.Module], ...], name: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    """Modules of some classes that are in no other of them."""
    if isinstance(model, kinds):
        yield name, model
        return
    for child_name, child in model.named_children():
        yield from _outermost(child, kinds, f"{name}.{child_name}" if name else child_name)


def _pieces(
    module: nn.Module, name: str, inside: bool
) -> Iterator[tuple[str, nn.Module, dict[str, nn.Parameter]]]:
    """What a module is taken apart into; `inside` a container, only containers are."""
    is_container = isinstance(module, _CONTAINERS)
    divisible = not name or is_container or (not inside and _holds_container(module))
    if isinstance(module, LINEARS) or not divisible:
        yield name, module, dict(module.named_parameters(name, remove_duplicate=False))
        return
    own = dict(module.named_parameters(name, recurse=False))
    if own:
        yield name, module, own
    for child_name, child in module.named_children():
        yield from _pieces(child, f"{name}.{child_name}" if name else child_name, is_container)


def _holds_container(module: nn.Module) -> bool:
    return any(isinstance(m, _CONTAINERS) for m in module.modules() if m is not module)


def _is_within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")
