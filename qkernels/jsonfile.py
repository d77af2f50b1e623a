"""Results that are saved as JSON and read again."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self


class JsonFile(ABC):
    """`save_json` and `load_json` for classes with `to_dict` and `from_dict`."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values; `from_dict` reads them."""

    @classmethod
    @abstractmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `to_dict` described.

        Args:
            values: a mapping as `to_dict` returns it.

        Raises:
            ValueError: it is none.
        """

    def save_json(self, path: str | PathLike[str]) -> None:
        """Write it as JSON; an existing file is replaced in one step or not at all.

        Args:
            path: the file to write.

        Raises:
            OSError: the file cannot be written.
        """
        from qkernels.report.files import write_atomically

        write_atomically(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load_json(cls, path: str | PathLike[str]) -> Self:
        """Read a file that `save_json` wrote.

        Args:
            path: the file.

        Raises:
            OSError: the file cannot be read.
            ValueError: it holds something else.

        Example:
            >>> model = nn.Sequential(nn.Linear(4, 4))
            >>> calibration = qk.calibrate(model, [torch.randn(8, 4)])
            >>> calibration.save_json(folder / "calibration.json")
            >>> qk.Calibration.load_json(folder / "calibration.json") == calibration
            True
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from None


def json_safe(value: Any) -> Any:
    """A value for JSON, which has no infinity and no NaN: they become strings `float` reads.

    Args:
        value: dicts, lists and tuples of plain values.

    Example:
        >>> json_safe({"a": (1.5, float("inf"))})
        {'a': [1.5, 'inf']}
    """
    if isinstance(value, dict):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
