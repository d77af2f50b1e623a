"""The number formats, read from the compiled table (`csrc/core/format.h`) and never restated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qkernels import _C


@dataclass(frozen=True)
class Format:
    """One row of the format table.

    Args:
        name: what users write, for example "int4".
        code: the number that ops take.
        bits: bits of one stored code.
        storage_dtype: element type of stored codes; 4-bit codes are two in a byte.
        has_zero_point: whether asymmetric quantization exists for it.
        lowest_code: the smallest code of an asymmetric quantizer, as stored.
        highest_code: the largest.
        zero_steps: a stored zero point counts in 1 / zero_steps of a code: int4's in eighths.
        packs: whether it can be a packed weight; the others only quantize and dequantize.

    Example:
        >>> format_of("int4").bits
        4
    """

    name: str
    code: int
    bits: int
    storage_dtype: torch.dtype
    has_zero_point: bool
    lowest_code: int
    highest_code: int
    zero_steps: int
    packs: bool

    def storage_features(self, features: int) -> int:
        """Elements of `storage_dtype` that hold `features` codes of one row."""
        return (features + 1) // 2 if self.bits == 4 else features

    def to_zero_point(self, codes: Tensor) -> Tensor:
        """The stored zero points nearest to numbers of codes; NaN becomes the lowest.

        Args:
            codes: float32 of any shape, which may lie between codes.

        Returns:
            `storage_dtype`, in steps of 1 / `zero_steps` of a code.

        Example:
            >>> format_of("int4").to_zero_point(torch.tensor([7.5, 3.2, -1.0]))
            tensor([60, 26,  0], dtype=torch.uint8)
        """
        low, high = self.lowest_code * self.zero_steps, self.highest_code * self.zero_steps
        steps = (codes * self.zero_steps).round().nan_to_num(low)
        return steps.clamp(low, high).to(self.storage_dtype)

    def zero_codes(self, zero_point: Tensor) -> Tensor:
        """The numbers of codes that stored zero points stand for.

        Args:
            zero_point: `storage_dtype`, of any shape.

        Returns:
            float32, exact.

        Example:
            >>> format_of("int4").zero_codes(torch.tensor([60, 26, 0], dtype=torch.uint8))
            tensor([7.5000, 3.2500, 0.0000])
        """
        return zero_point.float() / self.zero_steps


FORMATS: dict[str, Format] = {
    row["name"]: Format(
        name=row["name"],
        code=row["code"],
        bits=row["bits"],
        storage_dtype=getattr(torch, row["storage"]),
        has_zero_point=row["has_zero_point"],
        lowest_code=row["asymmetric_min"],
        highest_code=row["asymmetric_max"],
        zero_steps=row["zero_steps"],
        packs=row["packs"],
    )
    for row in _C.formats()
}

# The scale types that ops know, in the order of their codes.
SCALE_DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)


def format_of(name: str) -> Format:
    """The format with this name.

    Args:
        name: "int8", "int4", "nf4" or "int16".

    Raises:
        ValueError: there is no such format.

    Example:
        >>> format_of("int8").code
        0
    """
    found = FORMATS.get(name) if isinstance(name, str) else None
    if found is None:
        raise ValueError(f"format is {name!r}; expected one of {', '.join(map(repr, FORMATS))}")
    return found


def scale_dtype_code(dtype: torch.dtype) -> int:
    """The number that stands for a scale's type in a layout.

    Args:
        dtype: torch.float32, torch.bfloat16 or torch.float16.

    Raises:
        ValueError: scales are not stored in this type.

    Example:
        >>> scale_dtype_code(torch.bfloat16)
        1
    """
    if dtype not in SCALE_DTYPES:
        names = ", ".join(map(str, SCALE_DTYPES))
        raise ValueError(f"scale_dtype is {dtype!r}; expected one of {names}")
    return SCALE_DTYPES.index(dtype)


def kernel_dtype_code(dtype: torch.dtype) -> int:
    """The code of the dtype that a kernel reads for inputs of a dtype.

    Args:
        dtype: of inputs; float64 and integers count as float32, which they are turned into.

    Example:
        >>> kernel_dtype_code(torch.float64), kernel_dtype_code(torch.bfloat16)
        (0, 1)
    """
    return SCALE_DTYPES.index(dtype) if dtype in SCALE_DTYPES else 0
