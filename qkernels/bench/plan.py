"""What is measured: shapes, numbers of rows, groups of cases, and how to pick some of them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass

GROUPS = (
    "linear",
    "conv",
    "overhead",
    "int_mm",
    "backward",
    "quantize",
    "models",
    "cnn",
    "memory",
    "capped",
)

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
QUICK_ROWS = (1, 16, 128)


@dataclass(frozen=True)
class Shape:
    """A layer: x [rows, k] times a weight [n, k].

    Args:
        k: in_features.
        n: out_features.
        rows: numbers of rows to measure.
    """

    k: int
    n: int
    rows: tuple[int, ...] = ROWS

    def __str__(self) -> str:
        return f"{self.k}x{self.n}"

    @property
    def rotated(self) -> bool:
        """Whether its weights come from memory: those of a large model do, an encoder's stay in
        the last-level cache from one call to the next."""
        return self.k * self.n >= 1 << 23


# As in `nn.Linear(k, n)`: language models' layers, an encoder's, and small ones.
LLM_SHAPES = (
    Shape(4096, 4096),
    Shape(4096, 14336),
    Shape(14336, 4096),
    Shape(2048, 8192),
    Shape(4096, 32000),
)
ENCODER_SHAPES = (Shape(384, 384), Shape(384, 1536), Shape(768, 768), Shape(768, 3072))
SMALL_SHAPES = (Shape(1024, 1024, (1,)), Shape(1024, 4096, (1,)))
LINEAR_SHAPES = LLM_SHAPES + ENCODER_SHAPES + SMALL_SHAPES
QUICK_SHAPES = (Shape(4096, 4096, QUICK_ROWS), Shape(768, 3072, QUICK_ROWS))

BACKWARD_ROWS = (64, 128, 256, 512)
BACKWARD_SHAPES = tuple(
    Shape(s.k, s.n, BACKWARD_ROWS)
    for s in (Shape(4096, 4096), Shape(4096, 14336), Shape(768, 3072))
)
INT_MM_SHAPES = (Shape(4096, 4096, (16, 128, 512)),)
# Measured again with the instruction set capped; all with the same rows.
CAPPED_SHAPES = (Shape(4096, 4096, (1, 16, 64, 512)), Shape(768, 3072, (1, 16, 64, 512)))


@dataclass(frozen=True)
class Conv:
    """A convolution with a square kernel, padded so that a stride of 1 keeps the size.

    Args:
        channels: of x [batch, channels, size, size].
        out: channels of the result.
        size: height and width of x.
        kernel: height and width of the kernel.
        stride: of the kernel.
        groups: groups of channels; as many as channels for a depthwise convolution.
        batch: images.
    """

    channels: int
    out: int
    size: int
    kernel: int
    stride: int = 1
    groups: int = 1
    batch: int = 1

    def __str__(self) -> str:
        stride = f"/{self.stride}" if self.stride > 1 else ""
        groups = "" if self.groups == 1 else f" in {self.groups} groups"
        batch = f" batch {self.batch}" if self.batch > 1 else ""
        return (
            f"{self.kernel}x{self.kernel}{stride} {self.channels}-{self.out} "
            f"{self.size}x{self.size}{groups}{batch}"
        )

    @property
    def padding(self) -> int:
        """Zeros on each side of x."""
        return self.kernel // 2

    @property
    def operations(self) -> float:
        """Multiplications and additions, those with the zeros of the border included."""
        size = (self.size + 2 * self.padding - self.kernel) // self.stride + 1
        taps = self.kernel**2 * self.channels // self.groups
        return 2.0 * self.batch * size**2 * self.out * taps


# Layers of ResNet-50, its first one and one with a stride; a depthwise one of MobileNetV2.
CONVS = (
    Conv(64, 64, 56, 3),
    Conv(128, 128, 28, 3),
    Conv(256, 256, 14, 3),
    Conv(512, 512, 7, 3),
    Conv(64, 256, 56, 1),
    Conv(1024, 256, 14, 1),
    Conv(3, 64, 224, 7, stride=2),
    Conv(128, 128, 56, 3, stride=2),
    Conv(96, 96, 56, 3, groups=96),
    Conv(256, 256, 14, 3, batch=8),
)
QUICK_CONVS = (CONVS[2], CONVS[4], CONVS[8])

_KEYS = ("group", "shape", "m", "conv", "scheme", "peer", "model")


@dataclass(frozen=True)
class Only:
    """A choice among everything; an empty field chooses all.

    Args:
        group: names of `GROUPS`.
        shape: KxN. Of the group "linear" any shape may be asked for.
        m: numbers of rows.
        conv: patterns of convolutions, such as "3x3 *" or "*batch 8".
        scheme: patterns of own engines' names, such as "W4A8*".
        peer: patterns of peers' names, such as "onnxruntime*".
        model: patterns of models' names, such as "minilm*".
    """

    group: tuple[str, ...] = ()
    shape: tuple[str, ...] = ()
    m: tuple[int, ...] = ()
    conv: tuple[str, ...] = ()
    scheme: tuple[str, ...] = ()
    peer: tuple[str, ...] = ()
    model: tuple[str, ...] = ()

    @classmethod
    def parse(cls, words: Sequence[str]) -> Only:
        """Read words like `group=linear shape=4096x4096 m=1,16 scheme=W4A8*`.

        Raises:
            ValueError: an unknown key, or a value that it does not take.

        Example:
            >>> Only.parse(["shape=64x32", "m=1,2"]).m
            (1, 2)
        """
        fields: dict[str, tuple[str, ...]] = {}
        for word in words:
            key, equals, value = word.partition("=")
            if key not in _KEYS or not equals or not value:
                raise ValueError(
                    f"--only: {word!r} is not understood; write KEY=VALUE,VALUE with a key of "
                    f"{', '.join(_KEYS)}"
                )
            fields[key] = (*fields.get(key, ()), *value.split(","))
        for group in fields.get("group", ()):
            if group not in GROUPS:
                raise ValueError(
                    f"--only: no group is called {group!r}; choose of {', '.join(GROUPS)}"
                )
        for shape in fields.get("shape", ()):
            if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape):
                raise ValueError(f"--only: shape {shape!r} is not KxN, like 4096x14336")
        rows = fields.pop("m", ())
        if not all(re.fullmatch(r"[1-9]\d*", m) for m in rows):
            raise ValueError(f"--only: m={','.join(rows)} is not a list of numbers of rows")
        return cls(m=tuple(map(int, rows)), **fields)

    def groups(self, available: Sequence[str]) -> list[str]:
        return [g for g in available if not self.group or g in self.group]

    def shapes(self, available: Sequence[Shape], *, others: bool = False) -> list[Shape]:
        """The chosen shapes with the chosen rows.

        Args:
            available: to choose from.
            others: whether a shape that is not among them may be asked for.
        """
        found = [s for s in available if not self.shape or str(s) in self.shape]
        if others:
            known = {str(s) for s in available}
            rows = max((s.rows for s in available), key=len)
            for text in self.shape:
                if text not in known:
                    k, n = map(int, text.split("x"))
                    found.append(Shape(k, n, rows))
        chosen = [Shape(s.k, s.n, self.m if others and self.m else self._rows(s)) for s in found]
        return [s for s in chosen if s.rows]

    def _rows(self, shape: Shape) -> tuple[int, ...]:
        return tuple(m for m in shape.rows if not self.m or m in self.m)

    def convs(self, available: Sequence[Conv]) -> list[Conv]:
        return [c for c in available if _matches(str(c), self.conv)]

    def engine(self, name: str, own: bool) -> bool:
        return _matches(name, self.scheme if own else self.peer)

    def has_model(self, name: str) -> bool:
        return _matches(name, self.model)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatch.fnmatchcase(name, p) for p in patterns)
