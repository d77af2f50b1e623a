"""Adapters into a model, and out of it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from qkernels.nn import QLinear, QModule
from qkernels.nn.carry import hand_over_hooks, why_not_replaceable
from qkernels.nn.conv import QConvNd
from qkernels.nn.parents import settle_parents
from qkernels.plan import check_model
from qkernels.reads import why_parent_needs_float
from qkernels.transfer.adapter import BASES, LoRA, adapter_for, check_settings
from qkernels.transfer.parts import choose
from qkernels.transfer.strategy import Strategy, what_trains

# Set on modules that train in full beside the adapters, and that go into the adapters' file.
SAVED_TOO = "_saved_with_adapters"


def add_lora_(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16,
    targets: str | Sequence[str] | None = None,
    dropout: float = 0.0,
    *,
    rslora: bool = False,
    modules_to_save: str | Sequence[str] = (),
) -> Strategy:
    """Freeze a model and give linear and convolution layers low-rank adapters that train, in place.

    On a model that `quantize_` made this is QLoRA: 4-bit weights that stay as they are, and
    gradients through the kernels that run them. Patterns are those of `quantize_`.

    Args:
        model: float or quantized. It is changed.
        rank: of the updates.
        alpha: the updates are scaled by alpha / rank.
        targets: patterns of the layers that get adapters, but for the modules to save. By default
            all quantized linear and convolution layers, or all such layers of a float model, but
            transposed convolutions.
        dropout: share of its input that an adapter does without while training.
        rslora: scale by alpha / sqrt(rank) instead.
        modules_to_save: patterns of float modules that train in full and are saved with the
            adapters: a fresh head, for instance.

    Returns:
        What trains now.

    Raises:
        TypeError: an argument of another type.
        ValueError: a pattern that matches nothing fitting, a layer that cannot have an adapter, or
            a setting out of range. The model is then as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> _ = qk.quantize_(model, qk.W4A16(group_size=32), ignore="2")
        >>> qk.transfer.add_lora_(model, rank=4, modules_to_save="2").trainable
        1162
    """
    check_model(model, "add_lora_")
    check_settings("add_lora_", rank, alpha, dropout)
    names = names_of(model)
    saved = _modules_to_save(model, modules_to_save)
    chosen = _targets(model, names, targets, saved)
    for layer in chosen:
        wrap(model, names[layer], layer, adapter_for(layer, rank, alpha, dropout, rslora))
    for module in saved:
        setattr(module, SAVED_TOO, True)
    freeze_but_adapters(model)
    settle_parents(model)
    return what_trains(model, f"{type(model).__name__} with LoRA adapters of rank {rank}")


def remove_(model: nn.Module) -> None:
    """Take the adapters out of a model: its layers are again what they were, still frozen.

    Args:
        model: has adapters. It is changed.

    Raises:
        ValueError: it has no adapters.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = qk.transfer.add_lora_(model)
        >>> qk.transfer.remove_(model)
        >>> model
        Sequential(
          (0): Linear(in_features=8, out_features=8, bias=True)
        )
    """
    for names, adapter in adapters_for(model, "remove_"):
        unwrap(model, names, adapter)
    settle_parents(model)


def adapters(model: nn.Module) -> dict[str, LoRA]:
    """The adapters of a model by the qualified name of the layer; of several names, the first.

    Args:
        model: any module.
    """
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRA)}


def freeze_but_adapters(model: nn.Module) -> None:
    """Let the adapters train, and the modules that are saved with them, and nothing else.

    Args:
        model: has adapters.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, LoRA):
            module.lora_a.requires_grad_(True)
            module.lora_b.requires_grad_(True)
        elif hasattr(module, SAVED_TOO):
            module.requires_grad_(True)


def wrap(model: nn.Module, names: Sequence[str], layer: nn.Module, adapter: LoRA) -> None:
    """Put an adapter in the place of its base, whose hooks it takes over.

    Args:
        model: holds the layer.
        names: all qualified names of the layer.
        layer: the base.
        adapter: made for it.
    """
    hand_over_hooks(layer, adapter)
    for name in names:
        model.set_submodule(name, adapter)


def unwrap(model: nn.Module, names: Sequence[str], adapter: LoRA) -> None:
    """The reverse of `wrap`.

    Args:
        model: holds the adapter.
        names: all qualified names of the adapter.
        adapter: is taken out.
    """
    hand_over_hooks(adapter, adapter.base)
    adapter.base.train(adapter.training)
    for name in names:
        model.set_submodule(name, adapter.base)


def why_no_adapter(model: nn.Module, names: Sequence[str], layer: nn.Module) -> str | None:
    """Why a layer cannot have an adapter, or None.

    Args:
        model: holds the layer.
        names: all qualified names of the layer.
        layer: the layer.
    """
    inside = names[0].rpartition(".")[0]
    if isinstance(layer, LoRA) or isinstance(model.get_submodule(inside), LoRA):
        return "it has an adapter already; merge_ or remove_ that first"
    if type(layer) not in BASES:
        return (
            f"it is a {type(layer).__name__}; adapters go on nn.Linear, nn.Conv1d, nn.Conv2d, "
            "nn.Conv3d and their quantized forms"
        )
    if isinstance(layer, QModule) and layer.epilogue != "none":
        return (
            f"it computes an activation function, {layer.epilogue}, with its result, which an "
            "adapter has to come before; call qk.unfuse_(model) first"
        )
    if not names[0]:
        return "it is itself the model; use LoRALinear(layer) or LoRAConv(layer)"
    if not isinstance(layer, QModule):
        return why_not_replaceable(layer) or why_parent_needs_float(model, names)
    return None


def names_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """All qualified names of each module.

    Args:
        model: any module.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def _modules_to_save(model: nn.Module, patterns: str | Sequence[str]) -> list[nn.Module]:
    modules = {name: m for name, m in model.named_modules(remove_duplicate=False) if name}
    chosen = choose(model, patterns, modules, "add_lora_", "modules_to_save") if patterns else set()
    found = [module for name, module in modules.items() if name in chosen]
    for module in found:
        if any(not p.is_floating_point() for p in module.parameters()):
            name = next(name for name, m in modules.items() if m is module)
            raise ValueError(
                f"add_lora_: modules_to_save names {name} ({type(module).__name__}), whose "
                "quantized weight cannot train; leave it to an adapter, or replace it by a float "
                "layer first (replace_head_)"
            )
    return list(dict.fromkeys(found))


def _targets(
    model: nn.Module,
    names: dict[nn.Module, list[str]],
    targets: str | Sequence[str] | None,
    saved: list[nn.Module],
) -> list[nn.Module]:
    modules = {name: module for module, own in names.items() for name in own if name}
    if targets is None:
        is_quantized = any(isinstance(m, QModule) and type(m) in BASES for m in names)
        fit = [
            m
            for m in names
            if isinstance(m, QModule) == is_quantized
            and m not in saved
            and why_no_adapter(model, names[m], m) is None
        ]
        what = (
            "the model has adapters already; call merge_ or remove_ first"
            if any(isinstance(m, LoRA) for m in names)
            else "the model has no linear or convolution layer that could have an adapter"
        )
    else:
        chosen = choose(model, targets, modules, "add_lora_", "targets")
        found = dict.fromkeys(modules[n] for n in modules if n in chosen)
        # Transposed convolutions and subclasses among them are refused below, with the reason.
        kinds = (nn.Linear, nn.modules.conv._ConvNd, QLinear, QConvNd, LoRA)
        fit = [m for m in found if isinstance(m, kinds) and m not in saved]
        what = f"targets={targets!r} matches no linear or convolution layer"
        reasons = [
            f"{names[m][0]}: {reason}"
            for m in fit
            if (reason := why_no_adapter(model, names[m], m)) is not None
        ]
        if reasons:
            raise ValueError(f"add_lora_: cannot add adapters: {'; '.join(reasons)}")
    if not fit:
        raise ValueError(f"add_lora_: {what}")
    return fit


def adapters_for(model: nn.Module, op: str) -> list[tuple[list[str], LoRA]]:
    """The adapters that are to go out of a model, each with all of its names.

    Args:
        model: given by the user.
        op: the function that was called, for errors.

    Raises:
        ValueError: there are none, or the model is itself one.
    """
    check_model(model, op)
    found = [(n, m) for m, n in names_of(model).items() if isinstance(m, LoRA)]
    if not found:
        raise ValueError(f"{op}: {type(model).__name__} has no adapters; add_lora_ adds them")
    if not found[0][0][0]:
        raise ValueError(
            f"{op}: the model is itself a {type(model).__name__}, which cannot be replaced in "
            "place; put it into a module, such as nn.Sequential"
        )
    return found
