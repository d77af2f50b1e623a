"""load_model: a file that save_model wrote into a model, all of it or nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.attention import attention_split
from qkernels.functional import Quantized
from qkernels.fuse import apply_fusion
from qkernels.io.file import (
    ModelFile,
    ModelFileError,
    ModuleEntry,
    checksum,
    open_tensors,
    read_header,
)
from qkernels.io.save import full_name, own_tensors, uncompiled, why_not_storable
from qkernels.nn import QLinear, QModule
from qkernels.nn.carry import has_hooks, why_not_replaceable
from qkernels.nn.fused import FusedActivation, epilogue_of
from qkernels.nn.kinds import BY_NAME, QUANTIZED, quantized_from_shell
from qkernels.nn.parents import replace_everywhere, settle_parents
from qkernels.nn.storage import WEIGHT_KEYS


def load_model(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load a file that `save_model` wrote, and quantize the model as the file's was.

    The model may be the float model that was quantized, with any weights or on the meta device, or
    a model that is quantized in the same way already. Everything in the file is checked, checksums
    included, before the model is touched, so a model is loaded as a whole or stays as it was.
    Outputs are then the same to the bit as those of the model that was saved.

    Args:
        model: a module with the architecture of the saved one, on the CPU or the meta device. It is
            changed.
        path: of the file.

    Returns:
        The model that was given.

    Raises:
        TypeError: not a module.
        ModelFileError: the file is missing, damaged, not of qkernels, newer than this qkernels, or
            it does not fit the model.

    Example:
        >>> saved = nn.Sequential(nn.Linear(64, 32))
        >>> _ = qk.quantize_(saved, qk.W8A8())
        >>> qk.save_model(saved, folder / "model.safetensors")
        >>> model = qk.load_model(nn.Sequential(nn.Linear(64, 32)), folder / "model.safetensors")
        >>> x = torch.randn(3, 64)
        >>> torch.equal(model(x), saved(x))
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_model: model is {type(model).__name__}; expected a torch.nn.Module")
    model = uncompiled(model)
    header = read_header(path)
    _check_program(model, header)
    with attention_split(model, _split_in_file(model, header), keep=True):
        targets = _targets(model, header)
        _check_fused(model, header)
        with open_tensors(header.path) as tensors:
            values = _checked_values(model, header, targets, tensors)
            packed = _packed_weights(header, targets, values)
            sources = {key: header.tied.get(key, key) for key in _float_keys(targets)}
            floats = {key: values[source].clone() for key, source in sources.items()}
        # Nothing below can fail: it only puts tensors of the right shape and type in their places.
        _commit(model, header, targets, packed, floats)
    for name, layer in header.fused.items():
        if not isinstance(model.get_submodule(name), FusedActivation):
            apply_fusion(model, name, layer)
    settle_parents(model)
    return model


def _check_program(model: nn.Module, header: ModelFile) -> None:
    """A lowered model is its graph, so file and model must have the same."""
    from qkernels.lowering.model import LoweredModel

    if not isinstance(model, LoweredModel):
        if header.program is not None:
            raise ModelFileError(
                f"{header.path} holds a lowered model, which needs no model to be loaded into; use "
                "qk.load_lowered(path)"
            )
    elif header.program is None:
        raise ModelFileError(
            f"{header.path} holds no lowered model but the model is one; load it into the float "
            "model and lower that"
        )
    elif header.program != model.program.to_dict():
        raise ModelFileError(
            f"{header.path} holds a model that was lowered in another way than this one; use "
            "qk.load_lowered(path)"
        )


def _split_in_file(model: nn.Module, header: ModelFile) -> set[str]:
    """Attention of the model whose projections are layers in the file."""
    held = header.checksums.keys() | header.tied.keys()
    return {
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.MultiheadAttention) and full_name(name, "q_proj.weight") in held
    }


def _check_fused(model: nn.Module, header: ModelFile) -> None:
    """The activation modules that layers compute in the file must be such modules in the model."""
    modules = dict(model.named_modules())
    for name, layer in header.fused.items():
        module, wanted = modules.get(name), header.modules[layer].epilogue
        if isinstance(module, FusedActivation):
            fits = module.layer is modules.get(layer)
        else:
            fits = module is not None and epilogue_of(module) == wanted
        if not fits or module is None or has_hooks(module):
            kind = "missing" if module is None else f"a {type(module).__name__}"
            hooks = " with hooks" if module is not None and has_hooks(module) else ""
            raise ModelFileError(
                f"{header.path} has the activation {name} ({wanted}) fused into {layer}, but in "
                f"the model it is {kind}{hooks}; load it into the model it was saved from"
            )
    for name, module in modules.items():
        if isinstance(module, FusedActivation) and name not in header.fused:
            raise ModelFileError(
                f"the activation {name} is fused in the model but not in {header.path}; call "
                "qk.unfuse_(model) first"
            )


@dataclass
class _Target:
    """A module of the model, and the module that takes its place (itself, if it fits already)."""

    old: nn.Module
    new: nn.Module
    names: list[str] = field(default_factory=list)


def _targets(model: nn.Module, header: ModelFile) -> list[_Target]:
    """Match the file's quantized modules with the model's modules."""
    found: dict[int, _Target] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        target = found.get(id(module))
        if target is None:
            new = _new_module(header, name, module)
            target = found[id(module)] = _Target(module, new)
        target.names.append(name)
    names = {name for target in found.values() for name in target.names}
    for name in header.modules:
        if name not in names:
            raise ModelFileError(
                f"{header.path} has a quantized module {name!r}, which the model "
                f"({type(model).__name__}) does not have; load it into the model it was saved from"
            )
    for target in found.values():
        _check_same_entry(header, target.names)
    return list(found.values())


def _new_module(header: ModelFile, name: str, module: nn.Module) -> nn.Module:
    entry = header.modules.get(name)
    label = f"{name or 'the model'} ({type(module).__name__})"
    reason = why_not_storable(module)
    if reason is not None:
        raise ModelFileError(f"load_model: {label} {reason}, which no model file holds")
    if entry is None:
        if isinstance(module, QModule):
            raise ModelFileError(
                f"{label} is quantized in the model but not in {header.path}; load it into the "
                "float model, which is then quantized as the file says"
            )
        return module
    if isinstance(module, QModule):
        transforms = module.input_transforms if isinstance(module, QLinear) else ()
        given = (type(module).__name__, module.scheme, module.shape, transforms, module.epilogue)
        stored = (entry.kind, entry.scheme, entry.shape, entry.input_transforms, entry.epilogue)
        # A layer of the model may still have to be fused.
        if given not in (stored, (*stored[:-1], "none")):
            here, there = (
                " with ".join(("", *t, *([e] if e != "none" else [])))
                for t, e in (given[3:], stored[3:])
            )
            raise ModelFileError(
                f"{label} is {module.scheme} of shape {module.shape}{here} in the model but "
                f"{entry.kind} {entry.scheme} of shape {entry.shape}{there} in {header.path}; load "
                "it into the float model, which is then quantized as the file says"
            )
        return module
    return shell_for(header.path, entry, name, module)


def shell_for(
    path: str | os.PathLike[str], entry: ModuleEntry, name: str, module: nn.Module
) -> QModule:
    """The quantized module that a file has in the place of a float one, without values.

    Args:
        path: the file, for errors.
        entry: what it says about the module.
        name: of the module.
        module: of the float model.

    Raises:
        ModelFileError: they do not fit.
    """
    label = f"{name or 'the model'} ({type(module).__name__})"
    wanted = next(kind for kind, made in QUANTIZED.items() if made is BY_NAME[entry.kind])
    if not isinstance(module, wanted) or type(module).forward is not wanted.forward:
        raise ModelFileError(
            f"{label} is {entry.kind} in {path}, which replaces nn.{wanted.__name__} only; "
            "load it into the model it was saved from"
        )
    reason = why_not_replaceable(module)
    if reason is None:
        shape = tuple(BY_NAME[entry.kind].matrix_of(module).shape)
        if shape != entry.shape:
            reason = f"its weight is a matrix of shape {shape}, the file's {entry.shape}"
    if reason is None and not name:
        reason = "it is itself the model, which cannot be replaced in place; pass a quantized one"
    if reason is not None:
        raise ModelFileError(f"{path} does not fit the model at {label}: {reason}")
    new = quantized_from_shell(module, entry.scheme)
    new.dtype = entry.dtype
    for buffer, like in new.optional_targets().items():
        if buffer in entry.input_transforms:
            new._buffers[buffer] = like
    return new


def _check_same_entry(header: ModelFile, names: list[str]) -> None:
    first = header.modules.get(names[0])
    for name in names[1:]:
        if header.modules.get(name) != first:
            raise ModelFileError(
                f"{names[0]} and {name} are one module in the model but differ in {header.path}; "
                "load it into the model it was saved from"
            )


def _expected(targets: list[_Target]) -> dict[str, Tensor]:
    """Shape and type of every tensor that the file must hold, by name."""
    expected = {}
    for target in targets:
        own = own_tensors(target.new)
        if isinstance(target.new, QModule):
            own = target.new.storage_targets()
        for name in target.names:
            expected.update({full_name(name, part): tensor for part, tensor in own.items()})
    return expected


def _float_keys(targets: list[_Target]) -> set[str]:
    return {
        full_name(target.names[0], part) for target in targets for part in own_tensors(target.new)
    }


def _checked_values(
    model: nn.Module, header: ModelFile, targets: list[_Target], tensors: Any
) -> dict[str, Tensor]:
    """The file's tensors, after everything that can be wrong with them has been looked for."""
    path = header.path
    values: dict[str, Tensor] = {key: tensors.get_tensor(key) for key in sorted(tensors.keys())}
    expected = _expected(targets)
    stored = {key: header.tied.get(key, key) for key in expected}
    missing = [key for key, source in stored.items() if source not in values]
    unexpected = values.keys() - set(stored.values())
    if missing or unexpected:
        said = []
        if missing:
            said.append(f"it lacks {some(missing)}")
        if unexpected:
            said.append(f"the model has no place for {some(unexpected)}")
        raise ModelFileError(
            f"{path} does not fit the model ({type(model).__name__}): {' and '.join(said)}"
        )
    for key, want in expected.items():
        value = values[stored[key]]
        if value.shape != want.shape:
            raise ModelFileError(
                f"{path} does not fit the model: {key} has shape {tuple(value.shape)} in the file "
                f"but {tuple(want.shape)} in the model"
            )
        if value.dtype != want.dtype:
            raise ModelFileError(
                f"{path} does not fit the model: {key} is {value.dtype} in the file but "
                f"{want.dtype} in the model; convert the model first with .to({value.dtype})"
            )
    for key, value in values.items():
        if header.checksums.get(key) != checksum(value):
            raise ModelFileError(
                f"{path} is damaged: the bytes of {key} do not have the checksum they were saved "
                "with; copy the file again"
            )
    for key, want in expected.items():
        if 0 in (s for s, size in zip(want.stride(), want.shape, strict=True) if size > 1):
            raise ModelFileError(
                f"{key} is an expanded tensor in the model, which cannot be written to; make it "
                "contiguous before loading"
            )
    for target in targets:
        for name in target.new._non_persistent_buffers_set:
            buffer = target.new._buffers[name]
            if buffer is not None and buffer.is_meta:
                raise ModelFileError(
                    f"{full_name(target.names[0], name)} is on the meta device and not in any "
                    "file, since it is a non-persistent buffer; build the model on the CPU"
                )
    return values


def some(names: Iterable[str]) -> str:
    """The first of some names for a message, and how many more there are."""
    listed = sorted(names)
    more = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
    return ", ".join(listed[:4]) + more


def _packed_weights(
    header: ModelFile, targets: list[_Target], values: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Packed weight by the first name of each quantized module; tied ones are the same tensor."""
    packed: dict[object, Tensor] = {}
    by_name = {}
    for target in targets:
        module, name = target.new, target.names[0]
        if not isinstance(module, QModule):
            continue
        keys = [full_name(name, part) for part in WEIGHT_KEYS]
        sources = [header.tied.get(key, key) for key in keys]
        device = _device_of(target)
        layout = module.scheme.layout_on(device.type)
        same = (sources[0], device, layout, module.scheme.group_size, module.packing.conv)
        if same not in packed:
            data, scale = values[sources[0]], values[sources[1]]
            zero_point = None if module.scheme.symmetric else values[sources[2]]
            weight = Quantized(
                data,
                scale,
                zero_point,
                module.scheme.format,
                module.scheme.group_size,
                torch.Size(module.shape),
            )
            try:
                packed[same] = module.packing.pack(weight.to(device))
            except RuntimeError as error:
                problem = f"{header.path} has a bad weight for {name}: {error}"
                raise ModelFileError(problem) from None
        by_name[name] = packed[same]
    return by_name


def _device_of(target: _Target) -> torch.device:
    """Where a weight is going to be: where the module that it is for has its own."""
    for tensor in target.old.parameters(recurse=False):
        if not tensor.is_meta:
            return tensor.device
    return torch.device("cpu")


def _commit(
    model: nn.Module,
    header: ModelFile,
    targets: list[_Target],
    packed: dict[str, Tensor],
    floats: dict[str, Tensor],
) -> None:
    fresh: dict[object, nn.Parameter] = {}
    for target in targets:
        module, name = target.new, target.names[0]
        if isinstance(module, QModule):
            value = packed[name]
            if module is not target.old or module.packed.is_meta:
                parameter = nn.Parameter(value, requires_grad=False)
                module.packed = fresh.setdefault(id(value), parameter)
            else:
                with torch.no_grad():
                    module.packed.copy_(value)
            module.dtype = header.modules[name].dtype
            module.epilogue = header.modules[name].epilogue
        for part, old in own_tensors(module).items():
            _put(module, part, old, floats[full_name(name, part)], fresh)
        if module is not target.old:
            replace_everywhere(model, target.names, target.old, module)


def _put(
    module: nn.Module, part: str, old: Tensor, value: Tensor, fresh: dict[object, nn.Parameter]
) -> None:
    if not old.is_meta:
        with torch.no_grad():
            old.copy_(value)
    elif isinstance(old, nn.Parameter):
        # Names that shared a parameter share the new one.
        module._parameters[part] = fresh.setdefault(id(old), nn.Parameter(value, old.requires_grad))
    else:
        module._buffers[part] = value
