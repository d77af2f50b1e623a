"""What a search has measured of its layers, kept in a file, so that an interrupted one goes on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from qkernels.report.files import write_atomically


class Memory:
    """Damages that are known by layer and scheme.

    Args:
        path: a file to read them from and to keep them in, or None.
        identity: describes the search; asked for only if there is a file.

    Raises:
        ValueError: the file holds something else, or the state of another search.
    """

    def __init__(self, path: str | os.PathLike[str] | None, identity: Callable[[], str]) -> None:
        self.damages: dict[str, dict[str, float]] = {}
        self._path = path
        if path is None:
            return
        self._identity = identity()
        if not Path(path).exists():
            return
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            same = values["identity"] == self._identity
            damages = {
                str(name): {str(k): float(v) for k, v in row.items()}
                for name, row in values["damages"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"search: {str(path)!r} holds no state of a search ({error}); give another file"
            ) from None
        if not same:
            raise ValueError(
                f"search: {str(path)!r} holds the state of a search with another model, other "
                "batches or other settings; give another file, or delete this one to start anew"
            )
        self.damages = damages

    def save(self) -> None:
        """Write what is known, complete or not at all."""
        if self._path is not None:
            damages = {
                name: {k: v if math.isfinite(v) else str(v) for k, v in row.items()}
                for name, row in self.damages.items()
            }
            text = json.dumps({"identity": self._identity, "damages": damages}, indent=1)
            write_atomically(self._path, text + "\n")


def identity(model: nn.Module, settings: Sequence[str], data: Sequence[Any]) -> str:
    """A digest that is the same for searches that measure the same.

    Args:
        model: its parameters and buffers count.
        settings: all else that decides what is measured.
        data: batches.
    """
    from qkernels.ptq.checkpoint import identity_of

    return identity_of({"search": list(settings)}, (*model.parameters(), *model.buffers()), data)
