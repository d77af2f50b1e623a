"""The model file: safetensors, with one JSON document in its metadata that says what is what."""

from __future__ import annotations

import ctypes
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qkernels.functional import EPILOGUES
from qkernels.nn.kinds import BY_NAME, has_epilogue
from qkernels.nn.storage import WHOLE_CODES, counts_in_parts
from qkernels.schemes import Scheme

# Files are written as the first version that knows all that is in them: 2 has the graph of a
# lowered model, 3 activation functions that layers compute, 4 zero points in eighths of a code.
VERSION = 4
METADATA_KEY = "qkernels"
# The header of a model with a million tensors is about this long; a longer one is an attack.
MAX_HEADER_BYTES = 100_000_000


class ModelFileError(ValueError):
    """A model file that cannot be read, or that does not fit the model."""


@dataclass(frozen=True)
class ModuleEntry:
    """What a file says about one quantized module.

    Args:
        kind: its class, for example "QLinear".
        scheme: how its weight is stored and what its arithmetic is.
        shape: rows and columns of the weight.
        dtype: of the float module that it stands for.
        input_transforms: buffers of a QLinear that change x, "x_premul" and "k_perm".
        epilogue: function of the result that it computes too, a key of `functional.EPILOGUES`.
    """

    kind: str
    scheme: Scheme
    shape: tuple[int, int]
    dtype: torch.dtype
    input_transforms: tuple[str, ...] = ()
    epilogue: str = "none"

    def to_dict(self) -> dict[str, Any]:
        """The entry as plain JSON values."""
        entry = {
            "kind": self.kind,
            "scheme": self.scheme.to_dict(),
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        if self.input_transforms:
            entry["input_transforms"] = list(self.input_transforms)
        if self.epilogue != "none":
            entry["epilogue"] = self.epilogue
        return entry

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> ModuleEntry:
        """The entry that `to_dict` turned into JSON values.

        Args:
            entry: read from a file, so it may hold anything.

        Raises:
            KeyError, TypeError, ValueError: it is no such entry.
        """
        rows, columns = entry["shape"]
        if not all(isinstance(size, int) and 0 <= size < 1 << 40 for size in (rows, columns)):
            raise ValueError(f"shape is {entry['shape']!r}")
        if entry["kind"] not in BY_NAME:
            raise ValueError(f"kind is {entry['kind']!r}")
        dtype = getattr(torch, str(entry["dtype"]), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"dtype is {entry['dtype']!r}")
        scheme = Scheme.from_dict(entry["scheme"])
        transforms = tuple(entry.get("input_transforms", ()))
        known = ("x_premul", "k_perm") if entry["kind"] == "QLinear" else ()
        if not set(transforms) <= set(known):
            raise ValueError(f"input_transforms is {entry['input_transforms']!r}")
        epilogue = entry.get("epilogue", "none")
        if epilogue not in (EPILOGUES if has_epilogue(BY_NAME[entry["kind"]]) else ("none",)):
            raise ValueError(f"epilogue is {epilogue!r}")
        return cls(entry["kind"], scheme, (rows, columns), dtype, transforms, epilogue)


@dataclass(frozen=True)
class ModelFile:
    """What a model file says about itself; `read_header` gives it.

    Args:
        path: the file.
        version: of the file format.
        written_by: version of qkernels that wrote it.
        modules: quantized modules by qualified name.
        tied: tensors that are stored under another name, which it maps to.
        checksums: CRC-32 of each stored tensor's bytes.
        metadata: what the user gave to save_model.
        program: structure of a lowered model, as JSON values; None for others.
        fused: activation modules that a layer computes, by name, and that layer's name.
    """

    path: Path
    version: int
    written_by: str
    modules: Mapping[str, ModuleEntry]
    tied: Mapping[str, str]
    checksums: Mapping[str, int]
    metadata: Mapping[str, Any]
    program: Mapping[str, Any] | None = None
    fused: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The document that goes into the file."""
        document = {
            "version": self.version,
            "written_by": self.written_by,
            "modules": {name: entry.to_dict() for name, entry in self.modules.items()},
            "tied": dict(self.tied),
            "crc32": dict(self.checksums),
            "metadata": dict(self.metadata),
        }
        if self.program is not None:
            document["program"] = self.program
        if self.fused:
            document["fused"] = dict(self.fused)
        return json.dumps(document, allow_nan=False)


def read_header(path: str | os.PathLike[str]) -> ModelFile:
    """What a model file says about itself, without reading its tensors.

    Args:
        path: a file that save_model wrote.

    Raises:
        ModelFileError: the file is missing, damaged, not a qkernels file, or of a newer version.

    Example:
        >>> qk.save_model(nn.Sequential(qk.nn.QLinear(8, 4)), folder / "model.safetensors")
        >>> read_header(folder / "model.safetensors").modules["0"].scheme
        W8A8()
    """
    file = Path(path)
    header = raw_header(file)
    metadata = header.get("__metadata__")
    text = metadata.get(METADATA_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise ModelFileError(
            f"{file} is a safetensors file but holds no qkernels metadata, so it was not written "
            "by save_model; load it into the float model and quantize that"
        )
    try:
        return _parse(file, strict_json(text))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"{file} has damaged qkernels metadata: {error}") from None


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """The file's tensors, mapped rather than read: `keys()` and `get_tensor(key)`.

    Args:
        path: a safetensors file.

    Raises:
        ModelFileError: the library refuses the file.
    """
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{path} is damaged: {error}") from None


def checksum(tensor: Tensor) -> int:
    """CRC-32 of the bytes of a contiguous CPU tensor."""
    if tensor.nbytes == 0:
        return 0
    return zlib.crc32((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))


def raw_header(file: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file, of bounded length.

    Args:
        file: the file.

    Raises:
        ModelFileError: the file is missing, cut short, or no safetensors file.
    """
    try:
        size = file.stat().st_size
        if not file.is_file():
            raise ModelFileError(f"{file} is not a file")
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise ModelFileError(
                    f"{file} is not a safetensors file, or is cut short: its first 8 bytes "
                    f"announce a header of {length} bytes, the file has {size}"
                )
            header = strict_json(stream.read(length).decode())
    except OSError as error:
        raise ModelFileError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"{file} is not a safetensors file: {error}") from None
    if not isinstance(header, dict):
        raise ModelFileError(f"{file} is not a safetensors file: its header is no JSON object")
    return header


def strict_json(text: str) -> Any:
    """What a JSON text holds, NaN and infinities refused.

    Args:
        text: to be parsed.

    Raises:
        ValueError: it is no JSON.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")

    return json.loads(text, parse_constant=refuse)


def _parse(file: Path, document: dict[str, Any]) -> ModelFile:
    version = document["version"]
    if not isinstance(version, int) or version < 1:
        raise ValueError(f"version is {version!r}")
    if version > VERSION:
        raise ModelFileError(
            f"{file} has file version {version}, written by qkernels {document.get('written_by')}; "
            f"this qkernels reads up to version {VERSION}: upgrade it"
        )
    entries = document["modules"].items()
    modules = {str(name): ModuleEntry.from_dict(entry) for name, entry in entries}
    for name, module in modules.items():
        if version < 4 and counts_in_parts(module.scheme):
            raise ModelFileError(
                f"{file} has a weight for {name} that cannot be read: {WHOLE_CODES}"
            )
    tied = {str(alias): str(name) for alias, name in document["tied"].items()}
    checksums = {str(name): int(value) for name, value in document["crc32"].items()}
    metadata = document["metadata"]
    if not isinstance(metadata, dict):
        raise TypeError(f"metadata is a {type(metadata).__name__}")
    program = document.get("program")
    if program is not None and not isinstance(program, dict):
        raise TypeError(f"program is a {type(program).__name__}")
    fused = {str(name): str(layer) for name, layer in document.get("fused", {}).items()}
    for name, layer in fused.items():
        if layer not in modules or modules[layer].epilogue == "none":
            raise ValueError(f"fused names {layer!r} for {name!r}, which computes no activation")
    written_by = str(document["written_by"])
    return ModelFile(file, version, written_by, modules, tied, checksums, metadata, program, fused)
