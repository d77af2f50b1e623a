"""Adapters into the weights they belong to, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qkernels.nn import QLinear, QModule
from qkernels.nn.parents import settle_parents
from qkernels.nn.storage import quantize_weight
from qkernels.summary import table_text
from qkernels.transfer.adapter import LoRA, as_matrix, base_matrix
from qkernels.transfer.lora import adapters_for, unwrap

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class MergedLayer:
    """What merging did to one layer.

    Args:
        name: qualified name.
        kind: class and scheme of the layer.
        sqnr_db: of the merged weight as it is stored, against base + update, in decibels; infinite
            if nothing was lost.
        update: norm of the update over the norm of the base's weight.
        lost: norm of what storing changed over the norm of the update: near 1 and above, rounding
            undoes what was learned.
    """

    name: str
    kind: str
    sqnr_db: float
    update: float
    lost: float


@dataclass(frozen=True)
class Merged:
    """What `merge_` did: rows to iterate over, and a table when printed.

    Args:
        title: what was done.
        rows: one for each layer that had an adapter.
    """

    title: str
    rows: tuple[MergedLayer, ...]

    def __iter__(self) -> Iterator[MergedLayer]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        rows = [asdict(row) for row in self.rows]
        for row in rows:
            row["sqnr_db"] = row["sqnr_db"] if math.isfinite(row["sqnr_db"]) else None
        return {"title": self.title, "layers": rows}

    def __rich__(self) -> Table:
        from rich.markup import escape
        from rich.table import Table

        caption = (
            "update: its norm over the weight's. lost: rounding error over the update; near 100% "
            "and above, rounding undoes what was learned, and the adapter is better kept."
        )
        table = Table(title=self.title, title_justify="left", caption=caption)
        for column in ("layer", "is"):
            table.add_column(column, overflow="fold")
        for column in ("SQNR dB", "update", "lost"):
            table.add_column(column, justify="right")
        for row in self.rows:
            style = "yellow" if row.lost > 0.9 else None
            numbers = f"{row.sqnr_db:.1f}", f"{row.update:.2%}", f"{row.lost:.1%}"
            table.add_row(escape(row.name), escape(row.kind), *numbers, style=style)
        return table

    def __str__(self) -> str:
        return table_text(self.__rich__())


@torch.no_grad()
@torch.inference_mode(False)  # what is made must be usable outside of it
def merge_(model: nn.Module) -> Merged:
    """Add the adapters' updates to the weights, quantizing anew, and take the adapters out.

    A quantized weight is rounded a second time, and small updates may drown in that: the result
    says layer by layer what was lost. Keeping the adapters costs little and loses nothing. Memory
    grows by one float layer at a time. A weight that was shared with another module no longer is.

    Args:
        model: has adapters. It is changed.

    Returns:
        The error of each layer.

    Raises:
        ValueError: there are no adapters, or a merged weight would not be finite. The model is then
            as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32))
        >>> _ = qk.quantize_(model, qk.W8A8())
        >>> _ = qk.transfer.add_lora_(model, rank=2)
        >>> merged = qk.transfer.merge_(model)
        >>> [layer.name for layer in merged], type(model[0]).__name__
        (['0'], 'QLinear')
    """
    found = adapters_for(model, "merge_")
    for names, adapter in found:
        if not _merged_matrix(adapter).isfinite().all():
            raise ValueError(
                f"merge_: the update of {names[0]} is not finite, so nothing was merged; training "
                "has diverged: go back to an earlier checkpoint"
            )
    rows = []
    for names, adapter in found:
        rows.append(_merge(names[0], adapter))
        unwrap(model, names, adapter)
    settle_parents(model)
    return Merged(f"{type(model).__name__}: {len(rows)} adapters merged", tuple(rows))


def _merged_matrix(adapter: LoRA) -> Tensor:
    return base_matrix(adapter.base) + as_matrix(adapter.update())


def _merge(name: str, adapter: LoRA) -> MergedLayer:
    base = adapter.base
    before = base_matrix(base)
    wanted = _merged_matrix(adapter)
    # A parameter of its own: another module may share the old one.
    if isinstance(base, QModule):
        stored = base.as_stored(wanted) if isinstance(base, QLinear) else wanted
        base.packed = base.packing.parameter(quantize_weight(stored, base.scheme))
        kind = f"{type(base).__name__} {base.scheme}"
    else:
        old = base.weight
        merged = (old.detach().to(wanted.dtype) + adapter.update()).to(old.dtype)
        base.weight = nn.Parameter(merged, requires_grad=False)
        kind = f"{type(base).__name__} {str(old.dtype).removeprefix('torch.')}"
    error = (base_matrix(base).double() - wanted.double()).norm().item()
    update, norm = adapter.update().double().norm().item(), wanted.double().norm().item()
    return MergedLayer(
        name=name,
        kind=kind,
        sqnr_db=20 * math.log10(norm / error) if error and norm else math.inf,
        update=_ratio(update, before.double().norm().item()),
        lost=_ratio(error, update),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else (math.inf if part else 0.0)
