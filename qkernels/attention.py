"""nn.MultiheadAttention taken apart into layers that can be quantized, and put together again."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from qkernels.nn.attention import PROJECTIONS, QMultiheadAttention, why_not_splittable
from qkernels.nn.fastpath import settle_fast_paths
from qkernels.nn.parents import replace_everywhere
from qkernels.plan import check_model
from qkernels.reads import why_parent_needs_float

T = TypeVar("T", bound=nn.Module)


@torch.inference_mode(False)  # what is made must be usable outside of it
def split_attention_(model: nn.Module) -> list[str]:
    """Put layers in the place of the bare weights of every `nn.MultiheadAttention`, in place.

    `quantize_`, `quantize_calibrated_`, `search` and `calibrate` do so by themselves. Call it to
    train the projections: before `prepare_qat_`, or to put adapters on float ones. It changes the
    names of parameters, so make the optimizer afterwards.

    Args:
        model: float model. It is changed.

    Returns:
        Names of the modules that are `qk.nn.QMultiheadAttention` now, with float `nn.Linear`
        layers `q_proj`, `k_proj`, `v_proj` and `out_proj`. Subclasses are left, and attention whose
        weight other code reads.

    Raises:
        TypeError: not a module.
        ValueError: the model is itself an `nn.MultiheadAttention`.

    Example:
        >>> model = nn.TransformerEncoderLayer(64, 4, 128)
        >>> qk.split_attention_(model)
        ['self_attn']
        >>> len(qk.prepare_qat_(model, qk.W8A8()).converted)
        6
    """
    check_model(model, "split_attention_")
    if isinstance(model, nn.MultiheadAttention):
        raise ValueError(
            "split_attention_: the model is itself a MultiheadAttention, which cannot be replaced "
            "in place; use qkernels.nn.QMultiheadAttention.from_float(model)"
        )
    with attention_split(model, keep=True) as splits:
        return [split.names[0] for split in splits]


@contextmanager
def attention_split(
    model: nn.Module, only: Collection[str] | None = None, *, keep: bool = False
) -> Iterator[list[Split]]:
    """Take attention apart for a while, and for good where projections were then replaced.

    The layers' weights are views of the module's, so nothing is copied. On leaving, modules whose
    projections are still the same are in their places again; after an error, with `keep`, too.

    Args:
        model: is changed; anything else than a module is left to others to refuse.
        only: names of the modules to take apart, by default all that can be.
        keep: whether those that were not changed stay apart, too, if there is no error.

    Yields:
        What was taken apart.
    """
    splits = _split(model, only) if isinstance(model, nn.Module) else []
    if not splits:
        yield []
        return
    settle_fast_paths(model)
    stays = False
    try:
        yield splits
        stays = keep
    finally:
        for split in splits:
            if stays or split.changed:
                split.new.own_memory()
            else:
                replace_everywhere(model, split.names, split.new, split.old)
        settle_fast_paths(model)


@dataclass
class Split:
    """Attention that was taken apart.

    Args:
        names: of the module in the model.
        old: torch's module.
        new: what is in its place.
        layers: the projections that it has at first.
    """

    names: list[str]
    old: nn.MultiheadAttention
    new: QMultiheadAttention
    layers: tuple[nn.Module, ...]

    @property
    def changed(self) -> bool:
        """Whether a projection is another module now."""
        pairs = zip(PROJECTIONS, self.layers, strict=True)
        return any(getattr(self.new, name) is not layer for name, layer in pairs)

    def bytes_by_name(self) -> dict[str, int]:
        """Bytes of each projection, whose storage is that of the whole."""
        return {
            f"{self.names[0]}.{name}": sum(p.nbytes for p in layer.parameters())
            for name, layer in zip(PROJECTIONS, self.layers, strict=True)
        }


@contextmanager
def whole(model: nn.Module, splits: list[Split]) -> Iterator[None]:
    """Within `attention_split`, have torch's modules in their places again for a while.

    Args:
        model: the model.
        splits: what was taken apart, all unchanged.
    """
    for split in splits:
        replace_everywhere(model, split.names, split.new, split.old)
    settle_fast_paths(model)
    try:
        yield
    finally:
        for split in splits:
            replace_everywhere(model, split.names, split.old, split.new)
        settle_fast_paths(model)


def whole_again(model: nn.Module, layers: Collection[str]) -> None:
    """Put torch's module in the place of each attention of which layers are float again.

    Where that is not possible, as with an adapter on a projection, the layers stay.

    Args:
        model: is changed.
        layers: names of the layers.
    """
    parents = {name.rpartition(".")[0] for name in layers}
    for names, module in _by_module(model, QMultiheadAttention):
        if "" not in names and parents.intersection(names) and module.why_not_float() is None:
            replace_everywhere(model, names, module, module.to_float())


@torch.inference_mode(False)  # what is made must be usable outside of it
def _split(model: nn.Module, only: Collection[str] | None) -> list[Split]:
    splits = []
    made: dict[object, nn.Parameter] = {}
    for names, old in _by_module(model, nn.MultiheadAttention):
        wanted = only is None or any(name in only for name in names)
        if not wanted or "" in names or why_not_splittable(old) is not None:
            continue
        if why_parent_needs_float(model, names) is not None:
            continue
        new = QMultiheadAttention.viewing(old, made)
        layers = tuple(getattr(new, name) for name in PROJECTIONS)
        splits.append(Split(names, old, new, layers))
    for split in splits:
        replace_everywhere(model, split.names, split.old, split.new)
    return splits


def _by_module(model: nn.Module, kind: type[T]) -> Iterator[tuple[list[str], T]]:
    """The modules of a class, each once, with all of their names."""
    found: dict[int, tuple[list[str], T]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kind):
            found.setdefault(id(module), ([], module))[0].append(name)
    yield from found.values()
