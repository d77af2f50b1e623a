"""Summary: what a conversion did to every module of a model."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


@dataclass(frozen=True)
class ModuleRow:
    """What happened to one module.

    Args:
        name: qualified name in the model; of a module with several names, the first.
        kind: class before the conversion.
        became: class and scheme afterwards, or None if the module was left as it was.
        note: why it was left, or what else there is to know.
        bytes_before: of its own parameters and buffers; what is shared counts where it comes first.
        bytes_after: the same after the conversion.
        sqnr_nearest, sqnr: of a layer that was calibrated, signal to noise of its output in dB on
            held-out data, had it been rounded to nearest and as it is; None if not measured.
    """

    name: str
    kind: str
    became: str | None
    note: str
    bytes_before: int
    bytes_after: int
    sqnr_nearest: float | None = None
    sqnr: float | None = None


@dataclass(frozen=True)
class Summary:
    """What a conversion did to every module: rows to iterate over, and a table when printed.

    Args:
        title: what was done.
        rows: one for each module that holds tensors or has no children.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU())
        >>> summary = qk.quantize_(model, qk.W8A8())
        >>> [(row.name, row.became) for row in summary]
        [('0', 'QLinear W8A8()'), ('1', None)]
    """

    title: str
    rows: tuple[ModuleRow, ...]

    def __iter__(self) -> Iterator[ModuleRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def converted(self) -> tuple[ModuleRow, ...]:
        """Rows of the modules that became something else."""
        return tuple(row for row in self.rows if row.became is not None)

    @property
    def left(self) -> tuple[ModuleRow, ...]:
        """Rows of the modules that stayed as they were, each with a reason in `note`."""
        return tuple(row for row in self.rows if row.became is None)

    @property
    def bytes_before(self) -> int:
        """Bytes of the model's parameters and buffers before the conversion."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of the model's parameters and buffers after the conversion."""
        return sum(row.bytes_after for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "title": self.title,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "modules": [asdict(row) for row in self.rows],
        }

    def __rich__(self) -> Table:
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=self.title, title_justify="left", show_footer=True)
        table.add_column(
            "module", f"{len(self.converted)} of {len(self)} converted", overflow="fold"
        )
        table.add_column("was")
        table.add_column("is now")
        table.add_column("before", size_text(self.bytes_before), justify="right")
        table.add_column("after", size_text(self.bytes_after), justify="right")
        measured = any(row.sqnr is not None for row in self.rows)
        if measured:
            table.add_column("to nearest", justify="right")
            table.add_column("SQNR", justify="right")
        table.add_column("note")
        for row in self.rows:
            cells = (
                escape(row.name or "(the model)"),
                escape(row.kind),
                escape(row.became or "·"),
                size_text(row.bytes_before),
                size_text(row.bytes_after),
                *((_db(row.sqnr_nearest), _db(row.sqnr)) if measured else ()),
                escape(row.note),
            )
            table.add_row(*cells, style=None if row.became else "dim")
        return table

    def __str__(self) -> str:
        return table_text(self.__rich__())


def table_text(table: RenderableType) -> str:
    """A table as plain text.

    Args:
        table: anything that rich prints.
    """
    from rich.console import Console

    out = io.StringIO()
    # As wide as the text needs: a log file has no width, and folded cells are hard to search.
    Console(file=out, width=10_000, no_color=True).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _db(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} dB"


def size_text(count: int) -> str:
    """A number of bytes for people.

    Args:
        count: bytes.

    Example:
        >>> size_text(1536), size_text(87)
        ('1.5 KB', '87 B')
    """
    if count < 1024:
        return f"{count} B" if count else "0"
    size, unit = count / 1024, "KB"
    for larger in ("MB", "GB", "TB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.1f} {unit}" if size < 100 else f"{size:.0f} {unit}"
