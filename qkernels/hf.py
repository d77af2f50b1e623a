"""transformers' own save_pretrained and from_pretrained, for models with quantized layers.

Importing this module registers it with transformers, whose version 5 it needs, and an attention
function: `model.set_attn_implementation("qkernels")` has `qkernels::attention` compute where there
is no gradient (`qkernels/hf_attention.py`).

Example:
    >>> import qkernels.hf
    >>> import transformers
    >>> config = transformers.BertConfig(
    ...     hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    ... )
    >>> model = transformers.BertModel(config).eval()
    >>> summary = qk.quantize_(model, qk.W8A8())
    >>> model.save_pretrained(folder)
    >>> loaded = transformers.BertModel.from_pretrained(folder)
    >>> tokens = torch.tensor([[1, 2, 3]])
    >>> torch.equal(loaded(tokens).pooler_output, model(tokens).pooler_output)
    True
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

try:
    from transformers import PreTrainedModel
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    HfQuantizer.get_state_dict_and_metadata  # noqa: B018 - what saving hangs on; 4.x differs
except (ImportError, AttributeError) as missing:
    raise ImportError(
        "qkernels.hf needs transformers >= 5, which is not installed here; install it, or save "
        "with qk.save_model and load into the float model with qk.load_model"
    ) from missing

from qkernels import hf_attention as hf_attention  # registers attention
from qkernels.attention import attention_split
from qkernels.fuse import apply_fusion
from qkernels.io.file import ModuleEntry
from qkernels.io.load import shell_for
from qkernels.io.save import entry_of, full_name, fused_layer
from qkernels.nn import QModule, QMultiheadAttention
from qkernels.nn.fused import FusedActivation
from qkernels.nn.parents import replace_everywhere, settle_parents
from qkernels.nn.storage import STORED_NAMES, WEIGHT_KEYS, WHOLE_CODES, counts_in_parts
from qkernels.quantize import (
    DEFAULT_IGNORE,
    dequantize_,
    quantize_,
    schemes_by_pattern,
)
from qkernels.schemes import Scheme

__all__ = ["QuantizationConfig"]

METHOD = "qkernels"
# Written as the first version that knows all that is in it: 2 has zero points in eighths of a code.
VERSION = 2
_ATTENTION = ("in_proj_weight", "in_proj_bias")
_NOTHING: dict[str, Any] = {"version": 1, "modules": {}, "shared": {}, "fused": {}}


@register_quantization_config(METHOD)
class QuantizationConfig(QuantizationConfigMixin):  # type: ignore[misc, unused-ignore]
    """How from_pretrained is to quantize a float checkpoint: `quantization_config=...`.

    Args:
        scheme: one scheme, or schemes by pattern, as `qk.quantize_` takes them; none that is
            static.
        ignore: patterns of modules that stay float.

    Raises:
        TypeError: something else.

    Example:
        >>> import qkernels.hf
        >>> qkernels.hf.QuantizationConfig(qk.W4A16(group_size=32)).schemes
        {'*': W4A16(group_size=32)}
    """

    quant_method: Any

    def __init__(
        self,
        scheme: Scheme | Mapping[str, Scheme],
        ignore: str | Sequence[str] = DEFAULT_IGNORE,
    ) -> None:
        self.quant_method = METHOD
        self.schemes = schemes_by_pattern(scheme, "QuantizationConfig")
        self.ignore = ignore
        # Of a checkpoint that is quantized already.
        self.stored: _Stored | None = None

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """What config.json holds.

        Args:
            config_dict: as `to_dict` gave it.
            return_unused_kwargs: return a pair, with `kwargs`.

        Raises:
            ValueError: it is damaged, or newer than this qkernels.
        """
        config = cls.__new__(cls)
        config.quant_method, config.schemes, config.ignore = METHOD, {}, DEFAULT_IGNORE
        config.stored = _Stored(config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON values."""
        if self.stored is not None:
            return self.stored.to_dict()
        schemes = {pattern: scheme.to_dict() for pattern, scheme in self.schemes.items()}
        ignore = self.ignore if isinstance(self.ignore, str) else list(self.ignore)
        return {"quant_method": METHOD, "schemes": schemes, "ignore": ignore}


class _Stored:
    """What config.json says about a quantized checkpoint.

    Args:
        document: its `quantization_config`.

    Raises:
        ValueError: it is damaged, or newer than this qkernels.
    """

    def __init__(self, document: Mapping[str, Any]) -> None:
        try:
            if document["version"] > VERSION:
                raise ValueError(f"its version is {document['version']}, and {VERSION} is known")
            self.modules = {
                str(name): ModuleEntry.from_dict(entry)
                for name, entry in document["modules"].items()
            }
            self.shared = {str(k): str(v) for k, v in document["shared"].items()}
            self.fused = {str(k): str(v) for k, v in document["fused"].items()}
            unknown = {*self.shared, *self.shared.values(), *self.fused.values()} - {*self.modules}
            if unknown:
                raise ValueError(f"it names {sorted(unknown)[0]!r}, which is no quantized module")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"the quantization_config of config.json is not one that this qkernels reads: "
                f"{error}; save the model again, or upgrade qkernels"
            ) from None
        for name, entry in self.modules.items():
            if document["version"] < 2 and counts_in_parts(entry.scheme):
                raise ValueError(
                    f"the checkpoint has a weight for {name} that cannot be read: {WHOLE_CODES}"
                )

    @classmethod
    def of(cls, model: nn.Module) -> _Stored:
        """What is to be said about a model."""
        new = cls.__new__(cls)
        new.modules, new.shared, new.fused = {}, {}, {}
        first: dict[int, str] = {}
        layers = {id(m): name for name, m in model.named_modules() if isinstance(m, QModule)}
        for name, module in model.named_modules():
            if isinstance(module, QModule):
                new.modules[name] = entry_of(module)
                other = first.setdefault(id(module.packed), name)
                if other != name:
                    new.shared[name] = other
            elif isinstance(module, FusedActivation):
                new.fused[name] = fused_layer("save_pretrained", name, module, layers)
        return new

    def to_dict(self) -> dict[str, Any]:
        parts = any(counts_in_parts(entry.scheme) for entry in self.modules.values())
        return {
            "quant_method": METHOD,
            "version": 2 if parts else 1,
            "modules": {name: entry.to_dict() for name, entry in self.modules.items()},
            "shared": self.shared,
            "fused": self.fused,
        }


def _initialized(shape: Sequence[int] = (0,)) -> Tensor:
    """Nothing that transformers could want to initialize: some models do so in a parent."""
    nothing = torch.empty(tuple(shape), device="meta")
    nothing._is_hf_initialized = True  # type: ignore[attr-defined]
    return nothing


class _Awaiting(nn.Module):
    """Stands for a quantized layer while from_pretrained fills in its tensors.

    Args:
        layer: the layer, without values.
        shape: of the float layer's weight, which a model may ask for.
        shared: another layer has its weight.
    """

    def __init__(self, layer: QModule, shape: Sequence[int], shared: bool) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not a child: transformers must not see its parameters
        self.__dict__["weight"] = _initialized(shape)
        self.names: dict[str, str] = {}
        for key, like in layer.storage_targets().items():
            if not (shared and key in WEIGHT_KEYS):
                stored = self.names[key] = STORED_NAMES.get(key, key)
                empty = torch.empty(like.shape, dtype=like.dtype, device="meta")
                self._parameters[stored] = nn.Parameter(empty, requires_grad=False)

    layer: QModule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # a parent that initializes itself may ask for in_features
            return getattr(self.__dict__["layer"], name)

    def filled(self, name: str, twin: QModule | None) -> QModule:
        """The layer with what was loaded.

        Args:
            name: of the layer, for errors.
            twin: the layer whose weight it shares.
        """
        values: dict[str, Tensor] = {key: getattr(self, n) for key, n in self.names.items()}
        # transformers marks what it has loaded, and fills the rest with anything.
        absent = [k for k, v in values.items() if not getattr(v, "_is_hf_initialized", False)]
        if absent:
            raise ValueError(
                f"from_pretrained: the checkpoint lacks {full_name(name, absent[0])}, which its "
                "config.json announces; save the model again"
            )
        if twin is not None:
            values.update(twin.weight_entries())
        # As tensors: a parameter would become one of the layer's, also in the place of a buffer.
        self.layer.load_state_dict({k: v.detach() for k, v in values.items()}, assign=True)
        if twin is not None:
            self.layer.packed = twin.packed
        return self.layer


@register_quantizer(METHOD)
class Quantizer(HfQuantizer):  # type: ignore[misc, unused-ignore]
    """What transformers calls while it saves and loads; `quantize_` puts one into each model."""

    quantization_config: QuantizationConfig
    # A gradient flows through quantized layers to what is float. transformers' Trainer knows no
    # adapters but PEFT's, and trains a model without them only if it says the second, too.
    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def is_serializable(self) -> bool:
        """Whether save_pretrained may be called."""
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What save_pretrained writes; config.json is told what it is.

        Args:
            model: a transformers model.
        """
        stored = _Stored.of(model)
        state: dict[str, Tensor] = model.state_dict()
        for name, module in model.named_modules(remove_duplicate=False):
            if not isinstance(module, QModule):
                continue
            for key in WEIGHT_KEYS:
                value = state.pop(full_name(name, key), None)
                if value is not None and name in stored.modules and name not in stored.shared:
                    state[full_name(name, STORED_NAMES.get(key, key))] = value
        config = QuantizationConfig.from_dict(stored.to_dict())
        self.quantization_config = config
        model.config = copy.copy(model.config)  # float models may have the same object
        model.config.quantization_config = config
        return state, {}

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        stored = self.quantization_config.stored
        if stored is None:
            return
        parents = {name.rpartition(".")[0] for name in stored.modules}
        with attention_split(model, parents, keep=True) as splits:
            for split in splits:
                split.new.__dict__.update(dict.fromkeys(_ATTENTION, _initialized()))
        names = _names_by_module(model)
        modules: dict[str, nn.Module] = dict(model.named_modules())
        for name, entry in stored.modules.items():
            if name not in modules:
                raise ValueError(
                    f"from_pretrained: config.json names a quantized module {name!r}, which "
                    f"{type(model).__name__} does not have; load it as the class that was saved, "
                    "and a model with adapters by qk.transfer.load_adapters, into the base"
                )
            old = modules[name]
            layer = shell_for("config.json", entry, name, old)
            like = old.weight
            assert isinstance(like, Tensor)
            layer.dtype = like.dtype  # what from_pretrained was asked for
            awaiting = _Awaiting(layer, like.shape, name in stored.shared)
            replace_everywhere(model, names[id(old)], old, awaiting)
        # These have no float weight that could be tied; `shared` says which are one.
        held = {full_name(name, "weight") for name in stored.modules}
        tied = model.all_tied_weights_keys.items()
        model.all_tied_weights_keys = {k: v for k, v in tied if not {k, v} & held}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        if config.stored is None:
            quantize_(model, config.schemes, config.ignore)
            return
        for module in model.modules():
            if isinstance(module, QMultiheadAttention):
                for name in _ATTENTION:
                    module.__dict__.pop(name, None)
        names = _names_by_module(model)
        done: dict[str, QModule] = {}
        shared = config.stored.shared
        # Those that have a weight come before those that share it.
        for name in sorted(config.stored.modules, key=lambda name: name in shared):
            old = model.get_submodule(name)
            layer = old.filled(name, done.get(shared.get(name, "")))
            replace_everywhere(model, names[id(old)], old, layer)
            done[name] = layer
        for name, layer_name in config.stored.fused.items():
            apply_fusion(model, name, layer_name)
        settle_parents(model)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        dequantize_(model)
        return model if dtype is None else model.to(dtype)


def _names_by_module(model: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return names


def adopt(model: nn.Module) -> None:
    """Let the transformers models in a model know whether they hold quantized layers.

    Args:
        model: is looked through.
    """
    found: list[Any] = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    for module in found:
        ours = isinstance(getattr(module, "hf_quantizer", None), Quantizer)
        holds = any(isinstance(m, QModule) for m in module.modules())
        if holds and getattr(module, "hf_quantizer", None) is None:
            # What is there to say is found out when the model is saved.
            module.hf_quantizer = Quantizer(QuantizationConfig.from_dict(_NOTHING))
        elif ours and not holds:
            module.hf_quantizer.remove_quantization_config(module)
