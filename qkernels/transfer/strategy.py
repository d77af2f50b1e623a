"""Which parameters of a model train: all, the last parts, or the head alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from qkernels.nn import QModule
from qkernels.plan import check_model
from qkernels.summary import table_text
from qkernels.transfer.parts import Part, choose, parts

if TYPE_CHECKING:
    from rich.table import Table

KINDS = ("full", "partial", "head")
_WAY_OUT = (
    "Quantized weights cannot train. Give them adapters with qk.transfer.add_lora_, or train the "
    "float model and quantize it afterwards, with quantization-aware training if that costs too "
    "much accuracy."
)


@dataclass(frozen=True)
class PartRow:
    """What trains in one part of a model.

    Args:
        name: of the part, see `qk.transfer.parts`.
        kind: class of its first module.
        trainable: numbers in parameters that train; what parts share counts where it comes first.
        frozen: numbers in float parameters that do not.
        quantized: numbers that are held as quantized weights, which cannot train.
        note: what else there is to know.
    """

    name: str
    kind: str
    trainable: int
    frozen: int
    quantized: int
    note: str


@dataclass(frozen=True)
class Strategy:
    """What trains in a model: rows to iterate over, and a table when printed.

    Args:
        title: what was chosen.
        rows: one for each part of the model, from its input to its head.
        advice: a sentence on quantized weights that were asked to train, or nothing.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [(row.name, row.trainable) for row in qk.transfer.strategy(model, "head")]
        [('0', 0), ('2', 18)]
    """

    title: str
    rows: tuple[PartRow, ...]
    advice: str = ""

    def __iter__(self) -> Iterator[PartRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def trainable(self) -> int:
        """How many numbers train."""
        return sum(row.trainable for row in self.rows)

    @property
    def total(self) -> int:
        """How many numbers the model's parameters hold."""
        return self.trainable + sum(row.frozen + row.quantized for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "title": self.title,
            "trainable": self.trainable,
            "total": self.total,
            "advice": self.advice,
            "parts": [asdict(row) for row in self.rows],
        }

    def __rich__(self) -> Table:
        from rich.markup import escape
        from rich.table import Table

        table = Table(
            title=self.title,
            title_justify="left",
            show_footer=True,
            caption=self.advice or None,
            caption_justify="left",
        )
        share = self.trainable / self.total if self.total else 0.0
        table.add_column("part", f"{share:.2%} of {self.total:,} train", overflow="fold")
        table.add_column("is")
        table.add_column("train", f"{self.trainable:,}", justify="right")
        table.add_column("frozen", f"{sum(r.frozen for r in self.rows):,}", justify="right")
        table.add_column("quantized", f"{sum(r.quantized for r in self.rows):,}", justify="right")
        table.add_column("note")
        for row in self.rows:
            numbers = (f"{n:,}" if n else "·" for n in (row.trainable, row.frozen, row.quantized))
            name = escape(row.name or "(the model)")
            style = None if row.trainable else "dim"
            table.add_row(name, escape(row.kind), *numbers, escape(row.note), style=style)
        return table

    def __str__(self) -> str:
        return table_text(self.__rich__())


def strategy(
    model: nn.Module, kind: str, layers: int | str | Sequence[str] | None = None
) -> Strategy:
    """Choose which parameters of a model train, by setting `requires_grad`.

    Quantized weights are frozen by nature; what is float in a quantized model trains like any
    other, and the table says what cannot.

    Args:
        model: float or quantized. `requires_grad` of its parameters changes, and nothing else.
        kind: "full" for everything, "head" for the head alone, "partial" for what `layers` says.
        layers: for "partial": how many parts before the head train with it, or patterns of modules
            and parameters (see `quantize_`), which name all that trains.

    Returns:
        What trains, part by part.

    Raises:
        TypeError: layers is no number and no patterns.
        ValueError: an unknown kind, layers missing or too many, a pattern that matches nothing, or
            nothing that could train. `requires_grad` is then as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
        >>> qk.transfer.strategy(model, "partial", layers=1).trainable
        90
    """
    check_model(model, "strategy")
    if kind not in KINDS:
        raise ValueError(
            f"strategy: kind is {kind!r}; expected one of {', '.join(map(repr, KINDS))}"
        )
    if (layers is not None) != (kind == "partial"):
        must = (
            "needs layers, a number of parts or patterns" if layers is None else "takes no layers"
        )
        raise ValueError(f"strategy: {kind!r} {must}")
    found = parts(model)
    chosen = _chosen(model, found, kind, layers)
    wanted = {id(p) for part in found for n, p in part.parameters.items() if n in chosen}
    if not any(id(p) in wanted and _can_train(p) for p in model.parameters()):
        raise ValueError(
            f"strategy: {kind!r} chooses no float parameter, so nothing would train. {_WAY_OUT}"
        )
    for parameter in model.parameters():
        if _can_train(parameter):
            parameter.requires_grad_(id(parameter) in wanted)
    details = "" if layers is None else f", layers={layers!r}"
    stuck = any(id(p) in wanted and not _can_train(p) for p in model.parameters())
    title = f"{type(model).__name__}, {kind!r}{details}"
    return what_trains(model, title, _WAY_OUT if stuck else "")


def what_trains(model: nn.Module, title: str, advice: str = "") -> Strategy:
    """The table of what trains in a model now.

    Args:
        model: any module.
        title: of the table.
        advice: a sentence below the table.
    """
    quantized = {m.packed: m for m in model.modules() if isinstance(m, QModule)}
    moving = [
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
    ]
    seen: set[nn.Parameter] = set()
    rows = []
    for part in parts(model):
        own = {n: p for n, p in part.parameters.items() if p not in seen}
        seen.update(own.values())
        schemes = {str(quantized[p].scheme): None for p in own.values() if p in quantized}
        frozen = [p for p in own.values() if p not in quantized and not p.requires_grad]
        notes = [", ".join(schemes)] if schemes else []
        still = [n for n, p in own.items() if not p.requires_grad]
        if any(n.startswith(prefix) for n in still for prefix in moving):
            notes.append("running statistics still change in train mode; call eval() on the norms")
        rows.append(
            PartRow(
                name=part.name,
                kind=part.kind,
                trainable=sum(p.numel() for p in own.values() if p.requires_grad),
                frozen=sum(p.numel() for p in frozen),
                quantized=sum(
                    quantized[p].shape[0] * quantized[p].shape[1]
                    for p in own.values()
                    if p in quantized
                ),
                note="; ".join(notes),
            )
        )
    return Strategy(title, tuple(rows), advice)


def _chosen(
    model: nn.Module, found: list[Part], kind: str, layers: int | str | Sequence[str] | None
) -> set[str]:
    if kind == "full":
        return {name for part in found for name in part.parameters}
    if kind == "head":
        layers = 0
    if isinstance(layers, int):
        if isinstance(layers, bool) or not 0 <= layers < len(found):
            names = ", ".join(part.name for part in found[-4:])
            raise ValueError(
                f"strategy: layers is {layers!r}; expected 0 to {len(found) - 1}, the parts before "
                f"the head (the model's {len(found)} parts end with {names})"
            )
        return {name for part in found[len(found) - 1 - layers :] for name in part.parameters}
    assert layers is not None
    if not isinstance(layers, str | Sequence):
        raise TypeError(f"strategy: layers is {layers!r}; expected a number or patterns of names")
    known = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return choose(model, layers, known, "strategy", "layers")


def _can_train(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()
