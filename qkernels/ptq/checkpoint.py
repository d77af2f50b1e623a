"""Finished layers on the disk, so that an interrupted run can go on."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qkernels.formats import FORMATS
from qkernels.functional import Quantized
from qkernels.ptq.layer import Solved
from qkernels.report.files import write_atomically
from qkernels.schemes import Scheme

_RUN = "run.json"


@dataclass(frozen=True)
class Finished:
    """What a run knows of a unit of layers that is done.

    Args:
        solved: the quantized weight.
        biases: of each layer, as corrected; None without bias.
        quality: SQNR in dB of each layer rounded to nearest and as it is, None if not measured.
    """

    solved: Solved
    biases: tuple[Tensor | None, ...]
    quality: tuple[tuple[float, float] | None, ...]


class Checkpoint:
    """A folder with one file for each unit of layers that is done.

    Args:
        folder: made if need be; it must be empty or hold the state of the same run.
        identity: describes the run; see `identity_of`.

    Raises:
        ValueError: the folder holds the state of another run.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: str) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        run = self._folder / _RUN
        if not run.exists():
            if any(self._folder.iterdir()):
                raise ValueError(
                    f"quantize_calibrated_: the folder {str(folder)!r} is not empty and holds no "
                    "state of an earlier run; give an empty or a new one"
                )
            write_atomically(run, json.dumps({"identity": identity}) + "\n")
        try:
            known = json.loads(run.read_text("utf-8"))["identity"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"quantize_calibrated_: {run} is damaged ({error}); delete the folder to start anew"
            ) from None
        if known != identity:
            raise ValueError(
                f"quantize_calibrated_: {str(folder)!r} holds the state of a run with another "
                "model, other batches or other settings; give another folder, or delete this one "
                "to start anew"
            )

    def load(self, number: int, scheme: Scheme, shape: torch.Size) -> Finished | None:
        """What was saved for a unit, or None if it was not done or its file is damaged.

        Args:
            number: of the unit.
            scheme: how its weight is stored.
            shape: of its weight.
        """
        path = self._path(number)
        try:
            with safe_open(path, framework="pt") as file:
                found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                about = json.loads(file.metadata()["unit"])
        except (OSError, SafetensorError):
            return None
        weight = Quantized(
            found["data"],
            found["scale"],
            found.get("zero_point"),
            scheme.format,
            scheme.group_size,
            shape,
        )
        layers = range(len(about["quality"]))
        return Finished(
            Solved(weight, found.get("x_premul"), found.get("k_perm")),
            tuple(found.get(f"bias.{i}") for i in layers),
            tuple(None if q is None else (q[0], q[1]) for q in about["quality"]),
        )

    def save(self, number: int, finished: Finished) -> None:
        """Write what was found for a unit; the file appears complete or not at all.

        Args:
            number: of the unit.
            finished: what was found.
        """
        solved = finished.solved
        tensors = {
            "data": solved.weight.data,
            "scale": solved.weight.scale,
            "zero_point": solved.weight.zero_point,
            "x_premul": solved.x_premul,
            "k_perm": solved.k_perm,
            **{f"bias.{i}": bias for i, bias in enumerate(finished.biases)},
        }
        path = self._path(number)
        beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        present = {k: t.detach().contiguous() for k, t in tensors.items() if t is not None}
        try:
            save_file(present, beside, {"unit": json.dumps({"quality": finished.quality})})
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self._folder / f"unit-{number:05}.safetensors"


def identity_of(
    settings: Mapping[str, Any], weights: Iterable[Tensor], batches: Sequence[Any]
) -> str:
    """A digest that is the same for runs that do the same.

    Args:
        settings: plain JSON values.
        weights: float tensors of the model.
        batches: calibration data; tensors in them count, anything else by its repr.
    """
    # With zero points of another meaning, codes and what they cost are others.
    digest = hashlib.sha256(f"{[form.zero_steps for form in FORMATS.values()]}".encode())
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for weight in weights:
        _add(digest, weight)
    for batch in batches:
        _add(digest, batch)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            digest.update(str(key).encode())
            _add(digest, item)
    elif isinstance(value, tuple | list):
        for item in value:
            _add(digest, item)
    else:
        digest.update(repr(value).encode())
