"""What all quantized modules share: one packed weight, and how it is stored, moved and copied."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qkernels import _C
from qkernels.functional import Quantized
from qkernels.nn.carry import why_no_kernels
from qkernels.nn.sharded import gathered, is_sharded, sharded_like
from qkernels.nn.storage import (
    STORED_NAMES,
    WEIGHT_KEYS,
    WHOLE_CODES,
    Packing,
    SavedWeights,
    StorageForm,
    counts_in_parts,
    quantize_weight,
    quantized_like,
    weight_entries,
)
from qkernels.schemes import Scheme

__all__ = ["WEIGHT_KEYS", "QModule"]

_saved = SavedWeights()
# What a state_dict holds instead of WEIGHT_KEYS while the weight is spread over processes.
PACKED_KEYS = ("packed", "layout")


def on_hopper(packed: Tensor) -> bool:
    """Whether a weight is on a GPU that runs code of sm_90a, which the build has."""
    if not packed.is_cuda or not _C.build_info()["hopper"]:
        return False
    return torch.cuda.get_device_properties(packed.device).major == 9


class QModule(nn.Module):
    """A module whose weight is a quantized matrix, kept once, as its device's kernels read it.

    `packed` is a frozen parameter, so that optimizers pass it by. `state_dict()` and pickle give
    the weight in storage layout instead: `weight`, `weight_scale` and, if it is asymmetric,
    `weight_zero_point`. `layout` is that of the device that `packed` is on: `.to("cuda")` and
    `.cpu()` pack it anew.
    """

    packed: nn.Parameter
    layout: int
    # The ops that a device must have for modules of this kind.
    ops: tuple[str, ...] = ("pack", "unpack")
    # Attributes that a float module has no use for.
    own_attributes: tuple[str, ...] = (
        "dtype",
        "conv",
        "epilogue",
        "layout",
        "qualified_name",
        "scheme",
        "shape",
    )
    # Code that reads `weight` must not be led here; see `settle_fast_paths`.
    hides_weight = True
    # State that has this meaning; a change of the keys or of their contents needs a new number.
    _version = 2  # 1: zero points of int4 were whole codes
    # Set by quantize_ and load_model, to name the module in errors.
    qualified_name: str = ""
    # The function of the result that its kernel computes too; only some modules have one.
    epilogue: str = "none"

    def __init__(
        self,
        rows: int,
        columns: int,
        scheme: Scheme,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        conv: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(scheme, Scheme):
            raise TypeError(
                f"{type(self).__name__}: scheme is {scheme!r}; expected one like qk.W8A8() or "
                "qk.W4A16(group_size=128)"
            )
        self.scheme = scheme
        # Of the float module that this one stands for: what dequantize() gives.
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        if not self.dtype.is_floating_point:
            raise TypeError(f"{type(self).__name__}: dtype is {dtype}; expected a floating type")
        self.shape = (rows, columns)
        self.conv = conv  # taps and groups of a convolution
        where = torch.empty(0, device=device).device
        self._check_device(where)
        shape = self.packing.packed_shape(where.type)
        packed = torch.empty(shape, dtype=torch.uint8, device=where)
        self.packed = nn.Parameter(packed, requires_grad=False)

    @property
    def packing(self) -> Packing:
        """How the weight is packed."""
        return Packing(*self.shape, self.scheme, self.conv)

    def quantized_weight(self) -> Quantized:
        """The weight in storage layout, a copy; of a sharded one, all processes must ask for it."""
        return self.packing.unpack(gathered(self.packed.detach()))

    @staticmethod
    def matrix_of(module: nn.Module) -> Tensor:
        """A float module's weight as the matrix that is quantized.

        Args:
            module: of the kind that this class replaces.
        """
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight

    def weight_entries(self, prefix: str = "") -> dict[str, Tensor]:
        """The weight in storage layout under its state_dict keys, copies.

        Args:
            prefix: what to put before each key.
        """
        return weight_entries(self.quantized_weight(), prefix)

    def float_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float matrix that the weight stands for.

        Args:
            dtype: of the result, by default the module's.
        """
        dtype = self.dtype if dtype is None else dtype
        weight = self.quantized_weight()
        if dtype == torch.float64:
            return weight.dequantize(torch.float32).double()
        return weight.dequantize(dtype)

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Quantize a matrix as this module's weight, in place.

        Args:
            weight: float [rows, columns].
        """
        weight = weight.to(self.packed.device)
        self.packed.copy_(self.packing.pack(quantize_weight(weight, self.scheme)))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, as `nn.Module` does; `packed` brings its layout with it."""
        super().register_parameter(name, param)
        if name == "packed":
            self._follow(self.packed.device)

    def _follow(self, device: torch.device) -> None:
        self.layout = self.scheme.layout_on(device.type)

    def __getattr__(self, name: str) -> Any:
        # Torch's own way costs 0.7 µs for each parameter of each call.
        parameters = self.__dict__.get("_parameters")
        if parameters is not None and name in parameters:
            return parameters[name]
        if name == "weight":
            raise AttributeError(
                f"{self._label()} has no float `weight`; `.dequantize().weight` computes one, and "
                "quantize_(..., ignore=...) leaves a layer alone whose weight other code reads"
            )
        return super().__getattr__(name)

    def check_not_fused(self, what: str) -> None:
        """Refuse what would lose the activation function that is fused into this layer.

        Args:
            what: is to be done to it, for the message.

        Raises:
            ValueError: one is.
        """
        if self.epilogue != "none":
            raise ValueError(
                f"{self._label()}: its activation function, {self.epilogue}, is fused into it, "
                f"which {what} would lose; call qk.unfuse_(model) first"
            )

    @property
    def epilogue_text(self) -> str:
        """The end of `extra_repr`."""
        return "" if self.epilogue == "none" else f", epilogue={self.epilogue}"

    def _label(self) -> str:
        named = f" {self.qualified_name!r}" if self.qualified_name else ""
        return type(self).__name__ + named

    def _named(self, error: RuntimeError) -> RuntimeError:
        """The error with this module's name, if the op said it."""
        is_ours = str(error).startswith("qkernels::")
        return RuntimeError(f"{self._label()}: {error}") if is_ours else error

    # ---- state_dict -----------------------------------------------------------------------------

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        if is_sharded(self.packed):
            # Rows as they are: each process has some, and a block of 16 features is in one.
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[prefix + "layout"] = torch.tensor(self.layout)
            return
        entries = _saved.entries(self, destination, prefix)
        if entries is None:
            entries = self.weight_entries(prefix)
        destination.update(entries)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "packed"]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load this module's tensors, or report what is wrong and load none of them.

        A weight is loaded with its scales and zero points or not at all. Torch passes strict=True
        also for load_state_dict(strict=False) and drops the missing keys later, so a weight or a
        bias that is absent as a whole must not keep the rest from loading.
        """
        for hook in self._load_state_dict_pre_hooks.values():
            hook(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
        for key, stored in STORED_NAMES.items():  # a file of save_pretrained, read by others
            if prefix + stored in state_dict and prefix + key not in state_dict:
                state_dict[prefix + key] = state_dict.pop(prefix + stored)
        is_packed = prefix + "weight" not in state_dict and (
            prefix + "packed" in state_dict or is_sharded(self.packed)
        )
        targets = self.packed_targets() if is_packed else self.storage_targets()
        optional = self.optional_targets().items()
        targets.update((k, v) for k, v in optional if prefix + k in state_dict)
        found = {key: state_dict[prefix + key] for key in targets if prefix + key in state_dict}
        missing = [key for key in targets if key not in found]
        errors = [
            message
            for key, value in found.items()
            if (message := self._why_not(prefix + key, value, targets[key])) is not None
        ]
        # A plain dict says no version.
        version = local_metadata.get("version", self._version)
        if version < 2 and counts_in_parts(self.scheme) and "weight" in found:
            errors.append(f"{prefix}weight cannot be read: {WHOLE_CODES}.")
        together = PACKED_KEYS if is_packed else WEIGHT_KEYS
        absent = [key for key in together if key in missing]
        if absent and any(key in found for key in together):
            names = ", ".join(prefix + key for key in absent)
            errors.append(f"{names} must come with the rest of {prefix}weight; nothing was loaded.")
        if strict:
            missing_keys.extend(prefix + key for key in missing)
            unexpected_keys.extend(
                key
                for key in state_dict
                if key.startswith(prefix)
                and (name := key[len(prefix) :]) not in targets
                and name.split(".", 1)[0] not in self._modules
            )
        error_msgs.extend(errors)
        if errors:
            return
        try:
            self._load(found, prefix, local_metadata.get("assign_to_params_buffers", False))
        except RuntimeError as error:
            error_msgs.append(f"While loading {prefix}weight: {error}")

    def _load(self, found: dict[str, Tensor], prefix: str, assign: bool) -> None:
        # Packing is what can fail, so it comes before anything is written.
        packed = found.get("packed")
        if "weight" in found:
            packed = self.packing.pack(self._quantized(found, assign))
        rest = (key for key in found if key not in (*WEIGHT_KEYS, *PACKED_KEYS))
        for name in ["packed", *rest]:
            new = packed if name == "packed" else found[name]
            old = getattr(self, name)
            if new is None:
                continue
            if old is None:
                like = self.optional_targets()[name]
                setattr(self, name, new.to(like, copy=not assign))
            elif assign:
                is_parameter = isinstance(old, nn.Parameter)
                setattr(self, name, nn.Parameter(new, old.requires_grad) if is_parameter else new)
            elif old.is_meta and not new.is_meta:
                warnings.warn(
                    f"for {prefix}{name}: copying from a non-meta parameter in the checkpoint to a "
                    "meta parameter in the current model, which is a no-op. (Did you mean to pass "
                    "`assign=True` to load_state_dict?)",
                    stacklevel=2,
                )
            else:
                with torch.no_grad():
                    old.copy_(sharded_like(new, old))

    def _quantized(self, found: dict[str, Tensor], assign: bool) -> Quantized:
        parts = [found.get(key) for key in WEIGHT_KEYS]
        if not assign and not self.packed.is_meta:
            parts = [p if p is None else p.to(self.packed.device) for p in parts]
        data, scale, zero_point = parts
        assert data is not None
        assert scale is not None
        shape = torch.Size(self.shape)
        return Quantized(data, scale, zero_point, self.scheme.format, self.scheme.group_size, shape)

    def storage_targets(self) -> dict[str, Tensor]:
        """Shape and type of everything that a state_dict holds for this module."""
        weight = weight_entries(quantized_like(*self.shape, self.scheme), "")
        rest = {
            **self._parameters,
            **{k: b for k, b in self._buffers.items() if k not in self._non_persistent_buffers_set},
        }
        del rest["packed"]
        return {**weight, **{key: value for key, value in rest.items() if value is not None}}

    def packed_targets(self) -> dict[str, Tensor]:
        """The same for a state_dict that holds packed rows, as that of a sharded module does."""
        rest = {k: t for k, t in self.storage_targets().items() if k not in WEIGHT_KEYS}
        return {"packed": self.packed, "layout": torch.tensor(self.layout), **rest}

    def optional_targets(self) -> dict[str, Tensor]:
        """Shape and type of what a state_dict may hold for this module but need not."""
        return {}

    def _why_not(self, key: str, value: object, target: Tensor) -> str | None:
        if not isinstance(value, Tensor):
            return f"{key} is {type(value)} in the checkpoint; expected a tensor."
        if value.shape != target.shape:
            return (
                f"size mismatch for {key}: copying a param with shape {value.shape} from "
                f"checkpoint, the shape in current model is {target.shape} ({self.scheme})."
            )
        if key.rpartition(".")[2] == "layout" and value.item() != self.layout:
            return (
                f"{key} says that the packed rows are {_meaning(value)}, but the current model has "
                f"{_meaning(target)} ({self.scheme}): load them into a model of the scheme that "
                "they were saved from."
            )
        is_weight = key.rpartition(".")[2] in (*WEIGHT_KEYS, *PACKED_KEYS)
        if is_weight and value.dtype != target.dtype:
            from_float = value.is_floating_point() and not target.is_floating_point()
            way_out = (
                "load the float checkpoint into the float model and quantize that with quantize_."
                if from_float
                else "load it into a model of the scheme that it was saved from."
            )
            return (
                f"{key} is {value.dtype} in the checkpoint but {target.dtype} in the current model "
                f"({self.scheme}): {way_out}"
            )
        return None

    # ---- moving, copying, pickling --------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QModule:
        # fn may cast or move. A scalar shows which, and says no before anything has changed.
        here = self.packed.device
        probe = fn(torch.empty((), dtype=self.dtype, device=here))
        self._check_device(probe.device)
        packed = None
        if self.scheme.layout_on(here.type) != self.scheme.layout_on(probe.device.type):
            if is_sharded(self.packed):
                raise RuntimeError(
                    f"{self._label()}: its weight is spread over processes and packed for "
                    f"{here.type!r}; move the module before it is distributed"
                )
            packed = self.packing.moved(self.packed.detach(), probe.device)

        def on_float_state_only(t: Tensor) -> Tensor:
            if packed is not None and t is self.packed:
                return packed
            out = fn(t)
            return out if out.dtype == t.dtype or not self._keeps_dtype(t) else t.to(out.device)

        super()._apply(on_float_state_only, recurse)  # type: ignore[no-untyped-call]
        # Another module may have moved a weight that both share.
        self._follow(self.packed.device)
        self.dtype = probe.dtype
        return self

    def _check_device(self, device: torch.device) -> None:
        reason = why_no_kernels(device, self.ops)
        if reason is not None:
            raise RuntimeError(
                f"{self._label()}: {reason}, or turn it back to float with dequantize_"
            )

    def _keeps_dtype(self, tensor: Tensor) -> bool:
        """Whether `.to(dtype)` must leave a tensor of this module as it is."""
        return tensor is self.packed

    def __deepcopy__(self, memo: dict[int, Any]) -> QModule:
        # Through the packed bytes: pickle's way would unpack them, and lose ties to other modules.
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_parameters"] = {
            **self._parameters,
            "packed": StorageForm.of(self.packed, self.packing),
        }
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        packed = state["_parameters"]["packed"]
        if isinstance(packed, StorageForm):  # copy.copy, which does not pickle
            state["_parameters"]["packed"] = packed.packed
        state["layout"] = state["scheme"].layout_on(state["_parameters"]["packed"].device.type)
        super().__setstate__(state)  # type: ignore[no-untyped-call]


def _meaning(layout: Tensor) -> str:
    try:
        what = _C.describe_layout(int(layout.item()))
    except (RuntimeError, ValueError):
        return f"of the unknown layout {layout.item()}"
    return ", ".join(f"{key} {value}" for key, value in what.items())
