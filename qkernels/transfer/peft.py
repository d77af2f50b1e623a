"""Hugging Face PEFT on quantized models: its LoRA, over our layers."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qkernels.nn import QLinear
from qkernels.nn.storage import quantize_weight

if TYPE_CHECKING:
    import peft


def register_peft(config: peft.LoraConfig, model: nn.Module | None = None) -> peft.LoraConfig:
    """Let a PEFT LoRA configuration know QLinear, so that `peft.get_peft_model` works with it.

    PEFT does not write this into its files: to load adapters, read the configuration, register it,
    and pass it on, as in `PeftModel.from_pretrained(model, path, config=config)`.

    Args:
        config: is changed.
        model: where `target_modules` is not set or "all-linear", it becomes the names of this
            model's quantized linear layers, which PEFT would not count among the linear ones.

    Returns:
        The configuration that was given.

    Raises:
        ImportError: peft is not installed.
        TypeError: config is no LoraConfig.
        ValueError: target_modules cannot be set, since the model has no quantized linear layer.

    Example:
        >>> config = qk.transfer.register_peft(peft.LoraConfig(r=4), model)  # doctest: +SKIP
        >>> adapted = peft.get_peft_model(model, config)  # doctest: +SKIP
    """
    lora_linear = _lora_linear()
    import peft

    if not isinstance(config, peft.LoraConfig):
        raise TypeError(
            f"register_peft: config is {type(config).__name__}; expected a peft.LoraConfig (other "
            "methods of PEFT read float weights)"
        )
    if config.use_dora:
        raise ValueError("register_peft: use_dora needs float weights; leave it out")
    if model is not None and config.target_modules in (None, "all-linear"):
        names = [name for name, module in model.named_modules() if isinstance(module, QLinear)]
        if not names:
            raise ValueError(
                f"register_peft: {type(model).__name__} has no quantized linear layer; quantize it "
                "first, or set target_modules"
            )
        config.target_modules = set(names)
    config._register_custom_module({QLinear: lora_linear})
    return config


@functools.cache
def _lora_linear() -> type[nn.Module]:
    """PEFT's LoRA layer with merging for quantized weights; made here since PEFT is optional."""
    try:
        from peft.tuners import lora
        from peft.tuners.tuners_utils import check_adapters_to_merge
    except ImportError as missing:
        raise ImportError(
            "register_peft needs peft, which is not installed; run `pip install 'qkernels[peft]'`, "
            "or use qk.transfer.add_lora_, which needs nothing"
        ) from missing

    class LoraQLinear(lora.Linear):  # type: ignore[misc]
        """PEFT's forward pass over a QLinear; merging quantizes anew and keeps the old bytes."""

        def __init__(self, base_layer: QLinear, adapter_name: str, **kwargs: Any) -> None:
            base_layer.check_not_fused("an adapter")
            super().__init__(base_layer, adapter_name, **kwargs)
            self._before_merging: list[nn.Parameter] = []

        @torch.no_grad()
        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            base = self.get_base_layer()
            for name in check_adapters_to_merge(self, adapter_names):
                if name not in self.lora_A:
                    continue
                weight = base.float_weight().float() + self.get_delta_weight(name).float()
                if safe_merge and not weight.isfinite().all():
                    raise ValueError(f"adapter {name} holds NaN or Inf; nothing was merged")
                self._before_merging.append(base.packed)
                base.packed = base.packing.parameter(
                    quantize_weight(base.as_stored(weight), base.scheme)
                )
                self.merged_adapters.append(name)

        def unmerge(self) -> None:
            while self.merged_adapters:
                self.merged_adapters.pop()
                self.get_base_layer().packed = self._before_merging.pop()

    return LoraQLinear
