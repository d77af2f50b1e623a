"""save_model: a model into one safetensors file, all of it or nothing."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

import qkernels
from qkernels.io.file import METADATA_KEY, ModelFile, ModuleEntry, checksum
from qkernels.nn import QLinear, QModule
from qkernels.nn.fused import FusedActivation
from qkernels.nn.sharded import gathered, is_sharded
from qkernels.nn.storage import counts_in_parts
from qkernels.plan import tensor_key


def save_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a model, quantized or not, to a safetensors file that `load_model` reads.

    Weights are stored in storage layout, which does not depend on the machine. Tensors that are
    shared in the model are stored once. The file appears complete or not at all: it is written
    beside its place and then moved there, so that an older file survives a failure.

    Args:
        model: on the CPU, also one that `lower` made. One that is sharded over processes is
            gathered: then all of them must call this, and the first one writes.
        path: of the file, by custom ending in `.safetensors`.
        metadata: anything JSON can hold, to be read back with `qk.io.read_header(path).metadata`.

    Raises:
        TypeError: not a module, or metadata that JSON cannot hold.
        ValueError: the model holds state that is not a plain tensor with values.
        OSError: the file cannot be written.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32))
        >>> _ = qk.quantize_(model, qk.W4A16(group_size=32))
        >>> qk.save_model(model, folder / "model.safetensors", {"trained_on": "cats"})
        >>> qk.io.read_header(folder / "model.safetensors").metadata["trained_on"]
        'cats'
    """
    # Imported here because programs that lower no model need none of it.
    from qkernels.lowering.model import LoweredModel

    if not isinstance(model, nn.Module):
        raise TypeError(f"save_model: model is {type(model).__name__}; expected a torch.nn.Module")
    model = uncompiled(model)
    user = checked_metadata("save_model", metadata)
    modules: dict[str, ModuleEntry] = {}
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    fused: dict[str, str] = {}
    first_name: dict[object, str] = {}
    layer_names = {id(m): name for name, m in model.named_modules() if isinstance(m, QModule)}
    used_storages: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QModule):
            modules[name] = entry_of(module)
        elif isinstance(module, FusedActivation):
            fused[name] = fused_layer("save_model", name, module, layer_names)
        for key, shared_as, tensor in _named_tensors(name, module):
            if shared_as in first_name:
                tied[key] = first_name[shared_as]
                continue
            first_name[shared_as] = key
            tensors[key] = plain("save_model", key, tensor, used_storages)
    if any(map(is_sharded, model.parameters())) and torch.distributed.get_rank() != 0:
        return  # the first process has gathered the same and writes it
    program = model.program.to_dict() if isinstance(model, LoweredModel) else None
    version = 1 if program is None else 2
    if any(entry.epilogue != "none" for entry in modules.values()):
        version = 3
    if any(counts_in_parts(entry.scheme) for entry in modules.values()):
        version = 4
    header = ModelFile(
        path=Path(path),
        version=version,
        written_by=qkernels.__version__,
        modules=modules,
        tied=tied,
        checksums={key: checksum(tensor) for key, tensor in tensors.items()},
        metadata=user,
        program=program,
        fused=fused,
    )
    write_tensors("save_model", path, tensors, {METADATA_KEY: header.to_json()})


def entry_of(module: QModule) -> ModuleEntry:
    """What a file says about a quantized module."""
    return ModuleEntry(
        kind=type(module).__name__,
        scheme=module.scheme,
        shape=module.shape,
        dtype=module.dtype,
        input_transforms=module.input_transforms if isinstance(module, QLinear) else (),
        epilogue=module.epilogue,
    )


def fused_layer(op: str, name: str, fused: FusedActivation, layer_names: Mapping[int, str]) -> str:
    """Name of the layer that computes a fused activation.

    Args:
        op: the function that was called, for errors.
        name: of the activation.
        fused: stands in its place.
        layer_names: names of the model's quantized layers by id.

    Raises:
        ValueError: that layer is not in the model any more.
    """
    if id(fused.layer) not in layer_names or fused.layer.epilogue == "none":
        raise ValueError(
            f"{op}: the layer that computed the activation {name} is not in the model any "
            "more; put an activation module in its place"
        )
    return layer_names[id(fused.layer)]


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that torch.compile wrapped, or the module itself."""
    original = getattr(model, "_orig_mod", model)
    assert isinstance(original, nn.Module)
    return original


def why_not_storable(module: nn.Module) -> str | None:
    """Why a module's state is more than its parameters and persistent buffers, or None."""
    kind = type(module)
    if kind.get_extra_state is not nn.Module.get_extra_state:
        return "keeps extra state (get_extra_state), which need not be tensors"
    saves = kind._save_to_state_dict
    if saves not in (nn.Module._save_to_state_dict, QModule._save_to_state_dict):
        return "has a way of its own to save its state (_save_to_state_dict)"
    return None


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and persistent buffers, without a quantized weight."""
    found = {
        **module._parameters,
        **{k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set},
    }
    if isinstance(module, QModule):
        del found["packed"]
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def full_name(module_name: str, name: str) -> str:
    """Qualified name of something in a module."""
    return f"{module_name}.{name}" if module_name else name


def _named_tensors(name: str, module: nn.Module) -> Iterator[tuple[str, object, Tensor]]:
    """Name, identity and value of everything that is stored for a module."""
    reason = why_not_storable(module)
    if reason is not None:
        raise ValueError(
            f"save_model: {name or 'the model'} ({type(module).__name__}) {reason}; a model file "
            "holds tensors only, so move that state into buffers or save it beside the file"
        )
    if isinstance(module, QModule):
        if module.packed.is_meta:
            raise ValueError(f"save_model: {name} is on the meta device and has no values to save")
        for part, tensor in module.weight_entries().items():
            yield full_name(name, part), (id(module.packed), part), tensor
    for part, tensor in own_tensors(module).items():
        yield full_name(name, part), tensor_key(tensor), tensor


def plain(op: str, key: str, tensor: Tensor, used_storages: set[int]) -> Tensor:
    """The tensor as a file can hold it, in memory that no other stored tensor uses.

    Args:
        op: the function that was called, for errors.
        key: its name.
        tensor: on any device.
        used_storages: addresses of what is stored already; this one is added.

    Raises:
        ValueError: it has no values, or is not a plain dense tensor.
    """
    tensor = gathered(tensor.detach())
    if nn.parameter.is_lazy(tensor) or tensor.is_meta:
        raise ValueError(f"{op}: {key} has no values yet; initialize or load the model first")
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        raise ValueError(
            f"{op}: {key} is a {type(tensor).__name__} with layout {tensor.layout}; expected "
            "a plain dense tensor"
        )
    tensor = tensor.cpu().contiguous()
    storage = tensor.untyped_storage().data_ptr()
    if tensor.numel() and storage in used_storages:
        tensor = tensor.clone()
    used_storages.add(storage)
    return tensor


def checked_metadata(op: str, metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy of the user's metadata, as JSON gives it back.

    Args:
        op: the function that was called, for errors.
        metadata: given by the user.

    Raises:
        TypeError: JSON cannot hold it.
    """
    user = dict(metadata or {})
    try:
        copy = json.loads(json.dumps(user, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"{op}: metadata cannot be written as JSON: {error}") from None
    assert isinstance(copy, dict)
    return copy


def write_tensors(
    op: str, path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write a safetensors file, complete or not at all.

    Args:
        op: the function that was called, for errors.
        path: of the file; an older one is replaced once the new one is on the disk.
        tensors: plain ones, on the CPU, in memory of their own.
        metadata: to store with them.

    Raises:
        OSError: the file cannot be written.
    """
    # A link stays a link: what it points to is what is written.
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{op}: there is no folder {str(target.parent)!r}; create it")
    if target.is_dir():
        raise IsADirectoryError(f"{op}: {str(path)!r} is a folder; give the name of a file")
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        # The library makes a file that only its owner can read.
        beside.touch()
        mode = (target if target.exists() else beside).stat().st_mode & 0o777
        save_file(tensors, beside, {"format": "pt", **metadata})
        beside.chmod(mode)
        _to_disk(beside)
        os.replace(beside, target)
        _to_disk(target.parent)
    except SafetensorError as error:
        raise OSError(f"{op}: cannot write {str(path)!r}: {error}") from None
    finally:
        beside.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
