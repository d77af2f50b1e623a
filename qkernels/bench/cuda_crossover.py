"""From how many rows on it is faster to dequantize the weight and to call torch's matmul.

Each case is timed both ways, so that the table in csrc/cuda/linear_float.h can be corrected.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from qkernels import _C, functional
from qkernels.bench.cuda_peers import Call
from qkernels.schemes import NF4, W4A16, W8A16, Scheme

GROUP = "crossover"
KERNEL, MATMUL = "kernel", "dequantize + matmul"
# What QKERNELS_MATMUL_ROWS has to say for each.
SETTINGS = {KERNEL: str(1 << 60), MATMUL: "1"}


def cases() -> Iterator[tuple[str, Scheme, torch.dtype]]:
    """What is multiplied: a name, the scheme, and the type of x."""
    yield "W4A16 g128 bf16", W4A16(group_size=128, symmetric=True), torch.bfloat16
    yield "NF4 g64 bf16", NF4(group_size=64), torch.bfloat16
    yield "W8A16 bf16", W8A16(), torch.bfloat16
    yield "W4A16 g128 fp32", W4A16(group_size=128, symmetric=True), torch.float32
    yield "NF4 g64 fp32", NF4(group_size=64), torch.float32


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Within it, an environment variable has this value.

    Args:
        name: of the variable.
        value: that it has.
    """
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def forced(way: str) -> AbstractContextManager[None]:
    """Within it, ops go one of the two ways whatever the number of rows.

    Args:
        way: KERNEL or MATMUL.
    """
    return environment("QKERNELS_MATMUL_ROWS", SETTINGS[way])


def calls(
    shapes: Sequence[tuple[int, int]], rows: Sequence[int], device: str
) -> Iterator[tuple[str, float, Call]]:
    """Every case: its name, the multiplications and additions in it, and the op.

    Args:
        shapes: (in_features, out_features).
        rows: numbers of rows of x.
        device: "cuda", or "cpu" in a rehearsal.
    """
    for backward in (False, True):
        for k, n in shapes:
            for name, scheme, dtype in cases():
                # The kernel of a gradient in float32 has the bits of the CPU, and so stays.
                if backward and dtype == torch.float32:
                    continue
                for m in rows:
                    case = f"{m} rows {k}x{n} {name}{', gradient' if backward else ''}"
                    yield case, 2.0 * m * k * n, _call(m, k, n, scheme, dtype, device, backward)


def _call(
    rows: int, k: int, n: int, scheme: Scheme, dtype: torch.dtype, device: str, backward: bool
) -> Call:
    layout = scheme.layout_on(device)
    x = torch.randn(rows, n if backward else k, device=device, dtype=dtype)

    def prepare() -> tuple[Tensor, ...]:
        weight = torch.randn(n, k, device=device, dtype=dtype) / k**0.5
        coded = functional.quantize(
            weight, scheme.format, scheme.group_size, scheme.symmetric, scheme.scale_dtype
        )
        return (functional.pack(coded, layout),)

    sizes = (layout, k, n, scheme.group_size)
    nbytes = float(-(-n // _C.BLOCK_ROWS) * _C.block_bytes(layout, k, scheme.group_size))
    ops = torch.ops.qkernels

    def run(packed: Tensor) -> object:
        if backward:
            return ops.linear_backward_input(x, packed, *sizes)
        return ops.linear(x, packed, *[None] * 5, *sizes, 0, 0)

    return Call("", prepare, run, nbytes)


def table(times: Sequence[tuple[str, str, float]]) -> Iterator[str]:
    """Both times of each case side by side, as Markdown.

    Args:
        times: (case, KERNEL or MATMUL, seconds).
    """
    yield "| case | kernel µs | dequantize + matmul µs | × |"
    yield "| --- | --- | --- | --- |"
    found = {(case, way): seconds for case, way, seconds in times}
    for case in dict.fromkeys(case for case, _, _ in times):
        kernel, matmul = found.get((case, KERNEL)), found.get((case, MATMUL))
        if kernel is None or matmul is None:
            continue
        yield f"| {case} | {kernel * 1e6:.1f} | {matmul * 1e6:.1f} | {kernel / matmul:.2f} |"
