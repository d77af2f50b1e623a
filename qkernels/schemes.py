"""Schemes: how a layer's weight is stored and what its arithmetic is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

from qkernels import _C
from qkernels.formats import format_of, scale_dtype_code

# The numbers that the linear op takes.
ACTIVATIONS: dict[str, int] = {"float": 0, "symmetric": 1, "asymmetric": 2}
_BY_GRANULARITY: Any = None


@dataclass(frozen=True)
class Scheme:
    """What all schemes have; use one of the named ones: W8A8, W8A16, W4A16, W4A8, NF4.

    Args:
        group_size: consecutive weights of a row that share a scale; -1 for the whole row.
        symmetric: no zero points for the weight.
        activation: "float" (weights only), or int8 quantized "symmetric" or "asymmetric".
        static: the activation's scale is measured beforehand instead of for every token.
        scale_dtype: stored type of the weight's scales. By default float32 for whole rows, where
            they are few, and bfloat16 for groups.
        format: the weight's format.

    Raises:
        ValueError: a value that no kernel takes.
        TypeError: a value of another type.

    Example:
        >>> W4A16(group_size=32) == W4A16(32)
        True
    """

    group_size: int = field(default=-1, init=False)
    symmetric: bool = field(default=True, init=False, kw_only=True)
    activation: str = field(default="float", init=False, kw_only=True)
    static: bool = field(default=False, init=False, kw_only=True)
    scale_dtype: torch.dtype = field(default=_BY_GRANULARITY, kw_only=True)
    format: str = field(default="int8", init=False, repr=False)

    def __post_init__(self) -> None:
        name = type(self).__name__
        if type(self) is Scheme:
            raise TypeError(f"Scheme is the common base; use one of {', '.join(SCHEMES)}")
        for flag in ("symmetric", "static"):
            if not isinstance(getattr(self, flag), bool):
                value = getattr(self, flag)
                raise TypeError(f"{name}: {flag} is {value!r}; expected True or False")
        if not isinstance(self.group_size, int) or isinstance(self.group_size, bool):
            raise TypeError(f"{name}: group_size is {self.group_size!r}; expected an integer")
        if self.group_size != -1 and not 1 <= self.group_size < 1 << 31:
            raise ValueError(
                f"{name}: group_size is {self.group_size}; expected 1 to 2^31 - 1, or -1 for one "
                "scale per row"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"{name}: activation is {self.activation!r}; expected one of "
                f"{', '.join(map(repr, ACTIVATIONS))}"
            )
        if self.scale_dtype is _BY_GRANULARITY:
            object.__setattr__(self, "scale_dtype", _scale_dtype_for(self.group_size))
        try:
            scale_dtype_code(self.scale_dtype)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def __repr__(self) -> str:
        """The call that makes this scheme: its group size, and what differs from the defaults."""
        shown = []
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            default = _scale_dtype_for(self.group_size) if f.name == "scale_dtype" else f.default
            if f.init and (value != default or (f.name == "group_size" and value != -1)):
                shown.append(f"{f.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def format_code(self) -> int:
        """The format as ops take it."""
        return format_of(self.format).code

    @property
    def activation_code(self) -> int:
        """The activation as the linear op takes it."""
        return ACTIVATIONS[self.activation]

    @property
    def layout(self) -> int:
        """The number that describes a packed weight of this scheme on a CPU, but for its shape."""
        return self.layout_on("cpu")

    def layout_on(self, device: str) -> int:
        """The number that describes a packed weight of this scheme on a device, but for its shape.

        Args:
            device: type of the device, as `torch.device` names it. What is on the meta device has
                the shape that it has on a CPU.

        Example:
            >>> W4A16().layout_on("cuda") == W4A16().layout
            False
        """
        family = "cuda" if device == "cuda" else "cpu"
        scale = scale_dtype_code(self.scale_dtype)
        return _C.layout(self.format_code, scale, self.symmetric, family)

    def shares_weight_with(self, other: Scheme) -> bool:
        """Whether both store a weight the same way, whatever they do with activations."""
        return (self.layout, self.group_size) == (other.layout, other.group_size)

    def to_dict(self) -> dict[str, str | int | bool]:
        """The scheme as plain JSON values; `scheme_from_dict` reads them.

        Example:
            >>> W8A16().to_dict()
            {'scheme': 'W8A16', 'group_size': -1, 'scale_dtype': 'float32'}
        """
        values: dict[str, str | int | bool] = {"scheme": type(self).__name__}
        for f in dataclasses.fields(self):
            if f.init:
                value = getattr(self, f.name)
                is_dtype = isinstance(value, torch.dtype)
                values[f.name] = str(value).removeprefix("torch.") if is_dtype else value
        return values

    @classmethod
    def from_dict(cls, values: object) -> Scheme:
        """The scheme that `to_dict` described.

        Args:
            values: a mapping with the key "scheme" and the scheme's own fields.

        Raises:
            ValueError: an unknown scheme, an unknown field, or a value that it refuses.

        Example:
            >>> Scheme.from_dict({"scheme": "NF4", "group_size": 32})
            NF4(group_size=32)
        """
        name = values.get("scheme") if isinstance(values, dict) else None
        if not isinstance(values, dict) or not isinstance(name, str) or name not in SCHEMES:
            raise ValueError(f"{values!r} names no scheme; expected one of {', '.join(SCHEMES)}")
        made_by = SCHEMES[name]
        known = {f.name for f in dataclasses.fields(made_by) if f.init}
        given = {key: value for key, value in values.items() if key != "scheme"}
        if not given.keys() <= known:
            unknown = ", ".join(sorted(map(str, given.keys() - known)))
            raise ValueError(f"{name} has no field {unknown}; it has {sorted(known)}")
        if "scale_dtype" in given:
            given["scale_dtype"] = getattr(torch, str(given["scale_dtype"]), given["scale_dtype"])
        try:
            return made_by(**given)
        except TypeError as error:
            raise ValueError(str(error)) from None


@dataclass(frozen=True, repr=False)
class W8A8(Scheme):
    """int8 weights and int8 activations: integer arithmetic, the fastest at large batches.

    Args:
        group_size: weights per scale; -1, the default, is one scale per output feature.
        static: activations use one scale that was measured beforehand, instead of one per token.
        activation: "symmetric", or "asymmetric" for activations far from centred on zero.
        scale_dtype: see `Scheme`.

    Example:
        >>> W8A8().activation
        'symmetric'
    """

    static: bool = field(default=False, kw_only=True)
    activation: str = field(default="symmetric", kw_only=True)
    group_size: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_float_activation(self)


@dataclass(frozen=True, repr=False)
class W8A16(Scheme):
    """int8 weights, float activations: half the memory of bf16 and nearly its accuracy.

    Args:
        group_size: weights per scale; -1, the default, is one scale per output feature.
        scale_dtype: see `Scheme`.

    Example:
        >>> W8A16().scale_dtype
        torch.float32
    """

    group_size: int = -1


@dataclass(frozen=True, repr=False)
class W4A16(Scheme):
    """int4 weights in groups, float activations: the smallest, for single requests.

    Args:
        group_size: weights per scale; smaller is more accurate and larger.
        symmetric: without zero points; a little smaller and a little less accurate.
        scale_dtype: see `Scheme`.

    Example:
        >>> W4A16(group_size=32).format
        'int4'
    """

    group_size: int = 128
    symmetric: bool = field(default=False, kw_only=True)
    format: str = field(default="int4", init=False, repr=False)


@dataclass(frozen=True, repr=False)
class W4A8(Scheme):
    """int4 weights in groups and int8 activations per token: integer arithmetic on 4-bit weights.

    Args:
        group_size: weights per scale; smaller is more accurate and larger.
        symmetric: without zero points; a little smaller and a little less accurate.
        activation: "symmetric", or "asymmetric" for activations far from centred on zero.
        scale_dtype: see `Scheme`.

    Example:
        >>> W4A8().group_size
        128
    """

    group_size: int = 128
    symmetric: bool = field(default=False, kw_only=True)
    activation: str = field(default="symmetric", kw_only=True)
    format: str = field(default="int4", init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_float_activation(self)


@dataclass(frozen=True, repr=False)
class NF4(Scheme):
    """4-bit NormalFloat weights, float activations (Dettmers et al., "QLoRA", 2023).

    Args:
        group_size: weights per scale; smaller is more accurate and larger.
        scale_dtype: see `Scheme`.

    Example:
        >>> NF4()
        NF4(group_size=64)
    """

    group_size: int = 64
    format: str = field(default="nf4", init=False, repr=False)


SCHEMES: dict[str, type[Scheme]] = {
    scheme.__name__: scheme for scheme in (W8A8, W8A16, W4A16, W4A8, NF4)
}


def _scale_dtype_for(group_size: int) -> torch.dtype:
    return torch.float32 if group_size == -1 else torch.bfloat16


def _refuse_float_activation(scheme: Scheme) -> None:
    if scheme.activation == "float":
        name = type(scheme).__name__
        raise ValueError(
            f"{name}: activation is 'float'; expected 'symmetric' or 'asymmetric', or use "
            f"{name.replace('A8', 'A16')} for float activations"
        )
