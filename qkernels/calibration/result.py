"""Calibration: the ranges that a model's layers were seen to use, and the scales they lead to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch

from qkernels import functional
from qkernels.jsonfile import JsonFile

if TYPE_CHECKING:
    from rich.table import Table

_VERSION = 1


@dataclass(frozen=True)
class Int8Range:
    """A range of real numbers and the int8 quantizer for it.

    Args:
        min: smallest value to be represented.
        max: largest value to be represented.
        scale: what one step of the codes stands for, a float32 number.
        zero_point: code of zero; 0 if symmetric.

    Example:
        >>> Int8Range.of(-0.5, 2.0, symmetric=False).zero_point
        -77
    """

    min: float
    max: float
    scale: float
    zero_point: int

    @classmethod
    def of(cls, low: float, high: float, *, symmetric: bool) -> Int8Range:
        """The quantizer for a range, with the arithmetic of docs/NUMERICS.md.

        Args:
            low: smallest value, finite.
            high: largest value, finite, at least `low`.
            symmetric: codes -127 to 127 around zero; otherwise -128 to 127 with a zero point.

        Raises:
            ValueError: the range is no range.
        """
        ends = torch.tensor([low, high], dtype=torch.float32)
        if not (ends.isfinite().all() and low <= high):
            raise ValueError(
                f"Int8Range.of: [{low}, {high}] is not a range of float32 numbers with low <= high"
            )
        # The op that quantizes tensors chooses the scale, so there is one rule for both.
        codes = functional.quantize(ends, "int8", None, symmetric)
        zero_point = 0 if codes.zero_point is None else int(codes.zero_point)
        return cls(float(low), float(high), float(codes.scale), zero_point)


@dataclass(frozen=True)
class TensorRange:
    """What was seen of one tensor.

    Args:
        min: smallest finite value, or 0 if there was none.
        max: largest finite value, or 0 if there was none.
        count: values seen.
        nonfinite: how many of them were NaN or Inf; they count for nothing else.
        symmetric: the chosen range with its symmetric quantizer, or None if there was no finite
            value.
        asymmetric: the same for an asymmetric quantizer.
        channel_amax: largest magnitude of each channel, or None where channels are unknown: the
            last dimension for Linear, the one before the spatial ones for convolutions.
    """

    min: float
    max: float
    count: int
    nonfinite: int
    symmetric: Int8Range | None
    asymmetric: Int8Range | None
    channel_amax: tuple[float, ...] | None

    @property
    def note(self) -> str:
        """What is suspicious about it, or nothing."""
        if self.count == 0:
            return "saw nothing"
        said = []
        if self.nonfinite:
            share = "only" if self.nonfinite == self.count else f"{self.nonfinite} of {self.count}"
            said.append(f"saw {share} NaN or Inf")
        if self.nonfinite < self.count and self.min == self.max:
            said.append(f"saw a constant, {self.min:g}")
        return ", ".join(said)


@dataclass(frozen=True)
class LayerRanges:
    """What was seen of one layer.

    Args:
        name: qualified name in the model; of a layer with several names, the first.
        kind: its class.
        calls: how often it ran.
        input: range of what went in.
        output: range of what came out.
    """

    name: str
    kind: str
    calls: int
    input: TensorRange
    output: TensorRange

    @property
    def note(self) -> str:
        """What is suspicious about it, or nothing."""
        if self.calls == 0:
            return "never ran"
        sides = (("input", self.input.note), ("output", self.output.note))
        return "; ".join(f"{side} {note}" for side, note in sides if note)


@dataclass(frozen=True)
class Calibration(JsonFile):
    """The ranges of a model's layers: what `calibrate` returns and `quantize_` takes.

    Args:
        model: class of the model.
        observer: what chose the ranges.
        batches: how many batches the model ran.
        layers: one for each layer that was watched, in the order of the model's modules.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU())
        >>> calibration = qk.calibrate(model, [torch.randn(8, 64)], observer="minmax")
        >>> calibration.input("0").asymmetric.zero_point in range(-128, 128)
        True
        >>> calibration.output("0").symmetric.zero_point
        0
    """

    model: str
    observer: str
    batches: int
    layers: tuple[LayerRanges, ...]

    def __iter__(self) -> Iterator[LayerRanges]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __contains__(self, name: object) -> bool:
        return any(layer.name == name for layer in self.layers)

    def __getitem__(self, name: str) -> LayerRanges:
        """The layer of a name.

        Raises:
            KeyError: there is none.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        near = get_close_matches(name, [layer.name for layer in self.layers], n=3, cutoff=0.5)
        hint = f"; near it are {', '.join(map(repr, near))}" if near else ""
        raise KeyError(f"the calibration of {self.model} has no layer {name!r}{hint}")

    def input(self, name: str) -> TensorRange:
        """The range of what goes into a layer.

        Args:
            name: qualified name of the layer.

        Raises:
            KeyError: the layer was not watched.
        """
        return self[name].input

    def output(self, name: str) -> TensorRange:
        """The range of what comes out of a layer.

        Args:
            name: qualified name of the layer.

        Raises:
            KeyError: the layer was not watched.
        """
        return self[name].output

    @property
    def suspicious(self) -> tuple[LayerRanges, ...]:
        """Layers that never ran, or saw NaN, Inf or a constant, each with a `note`."""
        return tuple(layer for layer in self.layers if layer.note)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values; `from_dict` reads them."""
        return {"version": _VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """The calibration that `to_dict` described.

        Args:
            values: a mapping as `to_dict` returns it.

        Raises:
            ValueError: it is none, is of a newer version, or holds numbers that are no ranges.
        """
        try:
            if values["version"] != _VERSION:
                raise ValueError(f"version is {values['version']!r}, expected {_VERSION}")
            layers = tuple(_layer(layer) for layer in values["layers"])
            return cls(
                str(values["model"]), str(values["observer"]), int(values["batches"]), layers
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"this is not a calibration that this qkernels can read: {error}"
            ) from None

    def __rich__(self) -> Table:
        from rich.markup import escape
        from rich.table import Table

        ran = "1 batch" if self.batches == 1 else f"{self.batches} batches"
        title = escape(f"{self.model} calibrated with {self.observer} on {ran}")
        table = Table(title=title, title_justify="left")
        for column in ("layer", "kind"):
            table.add_column(column, overflow="fold")
        for column in ("input", "covered", "scale", "output", "covered", "scale"):
            table.add_column(column, justify="right")
        table.add_column("note")
        for layer in self.layers:
            cells = (*_cells(layer.input), *_cells(layer.output))
            name = escape(layer.name or "(the model)")
            table.add_row(name, escape(layer.kind), *cells, escape(layer.note))
        return table

    def __str__(self) -> str:
        from qkernels.summary import table_text

        return table_text(self.__rich__())


def _cells(tensor: TensorRange) -> tuple[str, str, str]:
    """What was seen, and the range and scale of the symmetric quantizer."""
    chosen = tensor.symmetric
    if chosen is None:
        return ("", "", "")
    seen = f"{tensor.min:.3g} … {tensor.max:.3g}"
    return (seen, f"{chosen.min:.3g} … {chosen.max:.3g}", f"{chosen.scale:.3g}")


def _layer(values: Mapping[str, Any]) -> LayerRanges:
    return LayerRanges(
        name=str(values["name"]),
        kind=str(values["kind"]),
        calls=int(values["calls"]),
        input=_tensor(values["input"]),
        output=_tensor(values["output"]),
    )


def _tensor(values: Mapping[str, Any]) -> TensorRange:
    channels = values["channel_amax"]
    return TensorRange(
        min=float(values["min"]),
        max=float(values["max"]),
        count=int(values["count"]),
        nonfinite=int(values["nonfinite"]),
        symmetric=_chosen(values["symmetric"]),
        asymmetric=_chosen(values["asymmetric"]),
        channel_amax=None if channels is None else tuple(float(value) for value in channels),
    )


def _chosen(values: Mapping[str, Any] | None) -> Int8Range | None:
    if values is None:
        return None
    chosen = Int8Range(
        float(values["min"]),
        float(values["max"]),
        float(values["scale"]),
        int(values["zero_point"]),
    )
    if not (0 < chosen.scale < math.inf and -128 <= chosen.zero_point <= 127):
        raise ValueError(f"{chosen} is no int8 quantizer")
    return chosen
