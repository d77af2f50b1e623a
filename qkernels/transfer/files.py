"""Adapters' files: safetensors with what trained, and nothing of the frozen base."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import qkernels
from qkernels.io.file import ModelFileError, checksum, open_tensors, raw_header, strict_json
from qkernels.io.load import some
from qkernels.io.save import checked_metadata, full_name, own_tensors, plain, uncompiled
from qkernels.io.save import write_tensors as write
from qkernels.nn.parents import settle_parents
from qkernels.plan import check_model
from qkernels.transfer.adapter import LoRA, adapter_for, adapter_shapes, check_settings
from qkernels.transfer.lora import (
    SAVED_TOO,
    adapters,
    freeze_but_adapters,
    names_of,
    why_no_adapter,
    wrap,
)

_VERSION = 1
_KEY = "qkernels_adapters"
_PARTS = ("lora_a", "lora_b")


@dataclass(frozen=True)
class _Settings:
    rank: int
    alpha: float
    dropout: float
    rslora: bool


@dataclass(frozen=True)
class _Header:
    path: Path
    adapters: dict[str, _Settings]
    modules_to_save: list[str]
    checksums: dict[str, int]


def save_adapters(
    model: nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a model's adapters, and whatever else trains, to a file that `load_adapters` reads.

    The frozen base is not in it. The modules that `add_lora_` was told to save are, even if they
    are frozen by now. The file appears complete or not at all.

    Args:
        model: has adapters; compiled or wrapped in DistributedDataParallel, if you like.
        path: of the file, by custom ending in `.safetensors`.
        metadata: anything JSON can hold.

    Raises:
        TypeError: not a module, or metadata that JSON cannot hold.
        ValueError: there are no adapters.
        OSError: the file cannot be written.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = qk.transfer.add_lora_(model, rank=2)
        >>> qk.transfer.save_adapters(model, folder / "adapters.safetensors")
    """
    model = _bare(model)
    check_model(model, "save_adapters")
    user = checked_metadata("save_adapters", metadata)
    found = adapters(model)
    if not found:
        raise ValueError(
            f"save_adapters: {type(model).__name__} has no adapters; add_lora_ adds them, and "
            "save_model saves a model without"
        )
    used: set[int] = set()
    tensors = {
        key: plain("save_adapters", key, tensor, used)
        for key, tensor in _what_to_save(model, found)
    }
    document = {
        "version": _VERSION,
        "written_by": qkernels.__version__,
        "adapters": {name: asdict(_settings_of(adapter)) for name, adapter in found.items()},
        "modules_to_save": [n for n, m in model.named_modules() if hasattr(m, SAVED_TOO)],
        "crc32": {key: checksum(tensor) for key, tensor in tensors.items()},
        "metadata": user,
    }
    write("save_adapters", path, tensors, {_KEY: json.dumps(document, allow_nan=False)})


def load_adapters(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load a file that `save_adapters` wrote into a model with the same layers.

    A model without adapters gets them, and is frozen beside what the file holds, as `add_lora_`
    does. The base may be quantized in another way than the one that the adapters were trained on,
    or float. Everything in the file is checked before the model is touched.

    Args:
        model: with the same layers as the saved one. It is changed.
        path: of the file.

    Returns:
        The model that was given.

    Raises:
        TypeError: not a module.
        ModelFileError: the file is missing, damaged, not of `save_adapters`, newer than this
            qkernels, or it does not fit the model.

    Example:
        >>> saved, model = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))
        >>> _ = model.load_state_dict(saved.state_dict())
        >>> _ = qk.transfer.add_lora_(saved, rank=2)
        >>> _ = nn.init.normal_(saved[0].lora_b)
        >>> qk.transfer.save_adapters(saved, folder / "adapters.safetensors")
        >>> model = qk.transfer.load_adapters(model, folder / "adapters.safetensors")
        >>> x = torch.randn(3, 8)
        >>> torch.equal(model(x), saved(x))
        True
    """
    bare = _bare(model)
    check_model(bare, "load_adapters")
    header = _read_header(Path(path))
    fresh = _check_places(bare, header)
    with open_tensors(header.path) as file:
        keys = list(file.keys())
        values: dict[str, Tensor] = {key: file.get_tensor(key).clone() for key in keys}
    targets = _check_values(bare, header, values, fresh)
    # Nothing below can fail.
    names = names_of(bare)
    for name in fresh:
        layer = bare.get_submodule(name)
        adapter = adapter_for(layer, **asdict(header.adapters[name]))
        for part in _PARTS:
            value = values[f"{name}.{part}"].to(getattr(adapter, part).device)
            setattr(adapter, part, nn.Parameter(value))
        wrap(bare, names[layer], layer, adapter)
    for name in header.modules_to_save:
        setattr(bare.get_submodule(name), SAVED_TOO, True)
    if fresh:
        freeze_but_adapters(bare)
    with torch.no_grad():
        for key, tensor in targets.items():
            tensor.copy_(values[key])
            if fresh and isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(True)
    settle_parents(bare)
    return model


def _bare(model: nn.Module) -> nn.Module:
    inner: Any = model.module if isinstance(model, DistributedDataParallel) else model
    return uncompiled(inner) if isinstance(inner, nn.Module) else inner


def _settings_of(adapter: LoRA) -> _Settings:
    return _Settings(adapter.rank, adapter.alpha, adapter.dropout, adapter.rslora)


def _what_to_save(model: nn.Module, found: dict[str, LoRA]) -> Iterator[tuple[str, Tensor]]:
    marked: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if hasattr(module, SAVED_TOO):
            for inner, part in module.named_modules(prefix=name):
                marked |= {full_name(inner, key): t for key, t in own_tensors(part).items()}
    for name, adapter in found.items():
        for part in _PARTS:
            marked[f"{name}.{part}"] = getattr(adapter, part)
    yield from marked.items()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and key not in marked:
            yield key, parameter


def _read_header(path: Path) -> _Header:
    metadata = raw_header(path).get("__metadata__")
    text = metadata.get(_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise ModelFileError(
            f"{path} holds no adapters that save_adapters wrote; load a whole model with load_model"
        )
    try:
        document = strict_json(text)
        version = document["version"]
        if version != _VERSION:
            raise ModelFileError(
                f"{path} has file version {version!r}, written by qkernels "
                f"{document.get('written_by')}; this qkernels reads version {_VERSION}: upgrade it"
            )
        settings = {}
        for name, values in document["adapters"].items():
            settings[name] = _Settings(**values)
            check_settings(name, settings[name].rank, settings[name].alpha, settings[name].dropout)
        saved = [str(name) for name in document["modules_to_save"]]
        checksums = {str(key): int(value) for key, value in document["crc32"].items()}
        return _Header(path, settings, saved, checksums)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"{path} has damaged adapters metadata: {error}") from None


def _check_places(model: nn.Module, header: _Header) -> list[str]:
    """Names of the layers that get a new adapter, after looking whether all can have theirs."""
    misfit = f"{header.path} does not fit the model ({type(model).__name__})"
    modules = dict(model.named_modules(remove_duplicate=False))
    names = names_of(model)
    for name in (*header.adapters, *header.modules_to_save):
        if name not in modules:
            raise ModelFileError(f"{misfit}, which has no module {name!r}")
    present = adapters(model)
    missing = present.keys() - header.adapters.keys()
    if missing:
        raise ModelFileError(
            f"{misfit}: it has no adapter for {some(missing)}; remove_ the model's adapters first"
        )
    fresh = [name for name in header.adapters if name not in present]
    for name, settings in header.adapters.items():
        if name in fresh:
            reason = why_no_adapter(model, names[modules[name]], modules[name])
            if reason is not None:
                raise ModelFileError(f"{misfit} at {name}: {reason}")
        elif _settings_of(present[name]) != settings:
            raise ModelFileError(
                f"{misfit} at {name}: its adapter has {_settings_of(present[name])}, the file's "
                f"{settings}; remove_ the model's adapters and load the file then"
            )
    return fresh


def _check_values(
    model: nn.Module, header: _Header, values: dict[str, Tensor], fresh: list[str]
) -> dict[str, Tensor]:
    """The model's tensors that are to be written to, by their names in the file."""
    misfit = f"{header.path} does not fit the model ({type(model).__name__})"
    there = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    targets: dict[str, Tensor] = {}
    wanted = {f"{name}.{part}" for name in header.adapters for part in _PARTS}
    if wanted - values.keys():
        raise ModelFileError(f"{header.path} is damaged: it lacks {some(wanted - values.keys())}")
    for key, value in values.items():
        name, _, part = key.rpartition(".")
        if name in fresh and part in _PARTS:
            shapes = adapter_shapes(model.get_submodule(name), header.adapters[name].rank)
            shape = shapes[_PARTS.index(part)]
            dtype = value.dtype if value.is_floating_point() else torch.float32
        else:
            target = there.get(_before_wrapping(key, fresh))
            if target is None:
                raise ModelFileError(f"{misfit}, which has no place for {key}")
            if target.is_meta:
                raise ModelFileError(
                    f"{misfit}: {key} is on the meta device; load the base's weights first"
                )
            targets[key], shape, dtype = target, tuple(target.shape), target.dtype
        if tuple(value.shape) != shape:
            raise ModelFileError(
                f"{misfit}: {key} has shape {tuple(value.shape)} in the file but {shape} in the "
                "model"
            )
        if value.dtype != dtype:
            raise ModelFileError(
                f"{misfit}: {key} is {value.dtype} in the file but {dtype} in the model; convert "
                f"the model first with .to({value.dtype})"
            )
        if header.checksums.get(key) != checksum(value):
            raise ModelFileError(
                f"{header.path} is damaged: the bytes of {key} do not have the checksum they were "
                "saved with; copy the file again"
            )
    return targets


def _before_wrapping(key: str, fresh: list[str]) -> str:
    """The name of a base's parameter in a model whose layers have no adapters yet."""
    for name in fresh:
        if key.startswith(f"{name}.base."):
            return name + key.removeprefix(f"{name}.base")
    return key
