"""Run as a script: hashes of results of seeded calls, to compare between ISAs and thread counts.

Prints JSON: the ISA and kernels that ran and, for each number of threads, a hash for each case. A
NaN counts as any NaN: its sign and payload are not promised.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from helpers import reference as ref
from helpers.conv import Geometry, conv_weight
from helpers.data import FLOATS, INTEGER_KINDS, KINDS, awkward, floats, rng, weight
from helpers.int8 import codes, orders
from qkernels import _C

ops = torch.ops.qkernels


def digest(results: Iterable[Tensor]) -> str:
    sha = hashlib.sha256()
    for y in results:
        y = torch.where(y.isnan(), torch.nan, y) if y.is_floating_point() else y
        sha.update(f"{y.dtype}{tuple(y.shape)}".encode())
        sha.update(y.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def hard(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """All magnitudes, zeros, subnormals; a NaN and infinities each in a row of its own."""
    x = awkward((rows, cols), torch.float32, seed="hard")
    x[-1, cols // 2], x[-2, -1], x[-3, 0] = torch.nan, torch.inf, -torch.inf
    return x.to(dtype)


def quantizing(dtype: torch.dtype, form: ref.Format, symmetric: bool) -> Iterator[Tensor]:
    for shape in ((40, 1), (33, 37), (20, 1003), (4, 33000)):
        x = hard(*shape, dtype)
        for group_size in (None, -1, 1, 8, 33):
            # An infinite value would make a tensor's one scale NaN, and hide all codes.
            part = x[:-3] if group_size is None else x
            scale_dtype = FLOATS[(shape[0] + (group_size or 0)) % 3]
            data, scale, zero = ops.quantize(part, form.code, group_size, symmetric, scale_dtype)
            yield from (data, scale, zero)
            given = None if symmetric else zero
            sizes = (form.code, group_size, shape[1], dtype)
            yield ops.dequantize(data, scale, given, *sizes)
            finite = torch.where(scale.isnan(), 0.1, scale)
            yield ops.quantize_with(part, finite, given, form.code, group_size)


def faking(dtype: torch.dtype, form: ref.Format, symmetric: bool) -> Iterator[Tensor]:
    for shape in ((40, 1), (33, 37), (20, 1003), (4, 33000)):
        x, grad = hard(*shape, dtype), floats(shape, seed="grad").to(dtype)
        for group_size in (None, -1, 1, 8, 33):
            part = x[:-3] if group_size is None else x
            scale_dtype = FLOATS[(shape[0] + (group_size or 0)) % 3]
            yield ops.fake_quantize(part, form.code, group_size, symmetric, scale_dtype)
            _, scale, zero = ops.quantize(part, form.code, group_size, symmetric, scale_dtype)
            narrow = torch.where(scale.isnan(), 0.1, scale / 2)
            given = (narrow, None if symmetric else zero, form.code, group_size)
            yield ops.fake_quantize_with(part, *given)
            yield from ops.fake_quantize_backward(grad[: len(part)], part, *given)


def multiplying(dtype: torch.dtype, kind_at: int, activation: int) -> Iterator[Tensor]:
    kind = INTEGER_KINDS[kind_at]
    for m, n, k, group_size in (
        (1, 700, 300, -1),
        (5, 49, 1000, 7),
        (18, 100, 127, 32),
        (50, 333, 130, 16),
        (129, 48, 96, -1),
        (3, 17, 70, 1),
    ):
        w = weight(kind, n, k, group_size)
        x = hard(m, k, dtype) if m > 4 else awkward((m, k), dtype)
        premul = torch.exp(floats((k,), seed="premul"))
        perm = torch.from_numpy(rng("perm", k).permutation(k))
        for epilogue in range(7) if dtype == torch.float32 else (0, 3):
            bias = floats((n,), FLOATS[epilogue % 3], seed="bias") if epilogue % 2 else None
            yield w.linear(x, bias, activation=activation, epilogue=epilogue)
        yield w.linear(x, activation=activation, premul=premul, perm=perm)
        zero = torch.tensor([-3], dtype=torch.int8) if activation == 2 else None
        yield w.linear(x, activation=activation, x_scale=torch.tensor(0.02), x_zero=zero)


def reading(dtype: torch.dtype, kind_at: int) -> Iterator[Tensor]:
    kind = KINDS[kind_at]
    for n, k, group_size in ((100, 1000, 128), (37, 77, 7), (2000, 64, -1)):
        w = weight(kind, n, k, group_size)
        yield w.packed
        yield from ops.unpack(w.packed, *w.sizes)
        indices = torch.from_numpy(rng("indices", n).integers(0, n, 300))
        yield ops.embedding(indices, w.packed, w.layout, n, k, group_size, dtype)


def int_products() -> Iterator[Tensor]:
    for m, k, n in ((1, 1000, 500), (50, 333, 130), (129, 64, 300)):
        a, b = (torch.from_numpy(rng(s).integers(-128, 128, s, "int8")) for s in ((m, k), (k, n)))
        yield ops.int_mm(a, b)


def convolving(dtype: torch.dtype, activation: int) -> Iterator[Tensor]:
    for size, kernel, groups, channels, outputs in (
        ((11, 13), (3, 3), 1, 20, 80),
        ((21, 18), (7, 7), 1, 3, 33),
        ((14, 15), (5, 3), 70, 1, 1),
        ((9, 7), (1, 1), 1, 260, 50),
        ((8, 7), (3, 3), 4, 10, 17),
    ):
        pad = tuple(k // 2 for k in kernel)
        g = Geometry(size, kernel, (2, 2), pad, pad, (1, 1), groups, channels, outputs)
        for geometry in (g, replace(g, transposed=True), replace(g, stride=(1, 1))):
            w = conv_weight(geometry, KINDS[2])
            x = geometry.input(dtype)
            x[1, 0, 3, 3] = torch.nan if geometry.transposed else 1000
            bias = floats((geometry.outputs,), dtype, seed="bias")
            yield w.conv(x, bias, activation=activation, epilogue=4)
            last = x.contiguous(memory_format=torch.channels_last)
            yield w.conv(last, activation=activation, y_range=(0.3, 5))
            residual = geometry_residual(geometry, dtype)
            yield w.conv(last, bias, residual=residual, activation=activation, x_range=(0.02, None))


def geometry_residual(geometry: Geometry, dtype: torch.dtype) -> Tensor:
    return floats((geometry.batch, geometry.outputs, *geometry.out), dtype, seed="residual")


def between_convolutions(channels: int, dtype: torch.dtype) -> Iterator[Tensor]:
    one, small, zero = torch.tensor(0.5), torch.tensor(0.03), torch.tensor([-3], dtype=torch.int8)
    for x in orders(codes((3, channels, 34, 37))):
        for ceil in (False, True):
            for size, stride, padding in ((3, 2, 1), (2, 2, 0), (5, 1, 2), (16, 9, 7)):
                sizes = ([size, size - 1], [stride, stride], [padding, padding // 2])
                yield ops.max_pool(x, *sizes, [1, 2], ceil)
                yield ops.avg_pool(x, one, zero, small, zero, *sizes, ceil, padding == 1, None)
                yield ops.avg_pool(x, small, None, None, None, *sizes, ceil, ceil, 5, dtype)
        for out in ([1, 1], [5, 7], [40, 2]):
            yield ops.adaptive_avg_pool(x, small, zero, None, None, out, dtype)
            yield ops.adaptive_avg_pool(x, small, zero, small, None, out)
        for epilogue in range(7):
            yield ops.add(x, x.flip(0), small, zero, one, None, one, zero, epilogue)
            yield ops.add(x, x.flip(1), small, zero, small, zero, None, None, epilogue, dtype)
        for dim in range(4):
            pair = torch.tensor([0.5, 0.03])
            yield ops.concat([x, x.flip(0)], pair, None, small, zero, dim)
        yield ops.lookup(x, codes((256,)))


def transforming(dtype: torch.dtype) -> Iterator[Tensor]:
    for rows, keys, heads, kv_heads, size, values in (
        (33, 65, 4, 2, 16, 24),
        (1, 300, 6, 2, 64, 33),
        (2, 70, 2, 2, 37, 64),
        (130, 130, 2, 1, 40, 7),
    ):
        q, k = floats((2, rows, heads * size), dtype), floats((2, keys, kv_heads * size), dtype)
        v = floats((2, keys, kv_heads * values), dtype)
        q[1, -1, 0], v[0, keys // 2, 1] = torch.nan, torch.inf
        for mask in (None, floats((heads, rows, keys)), floats((2, 1, 1, keys)) > 0):
            for factor in (0.2, 30):
                for causal in (False, True):
                    yield ops.attention(q * factor, k, v, mask, heads, size**-0.5, causal)
    for shape in ((40, 1), (33, 37), (20, 1003), (4, 33000), (300, 384)):
        x, residual = hard(*shape, dtype), floats(shape, dtype)
        weight, bias = (floats(shape[1:], torch.float32, seed) for seed in ("weight", "bias"))
        for rms in (False, True):
            yield from ops.add_norm(x, residual, weight, bias, 1e-5, rms, True)
            yield ops.add_norm(x, None, weight.to(dtype), None, 1e-5, rms, False)[0]


def digests() -> dict[str, str]:
    """By case. Only what the contract promises to be equal everywhere."""
    found = {"int_mm": digest(int_products())}
    for dtype in FLOATS:
        for form in ref.FORMATS:
            for symmetric in (True, False) if form.asymmetric else (True,):
                found[f"quantize {form.name} {symmetric} {dtype}"] = digest(
                    quantizing(dtype, form, symmetric)
                )
                found[f"fake_quantize {form.name} {symmetric} {dtype}"] = digest(
                    faking(dtype, form, symmetric)
                )
        for i, kind in enumerate(INTEGER_KINDS):
            for activation in (1, 2):
                found[f"linear {kind} {activation} {dtype}"] = digest(
                    multiplying(dtype, i, activation)
                )
        for activation in (1, 2):
            found[f"conv {activation} {dtype}"] = digest(convolving(dtype, activation))
        channels = (3, 64, 83)[FLOATS.index(dtype)]
        found[f"int8 ops {channels} {dtype}"] = digest(between_convolutions(channels, dtype))
        found[f"transformer {dtype}"] = digest(transforming(dtype))
        for i, kind in enumerate(KINDS):
            found[f"read {kind} {dtype}"] = digest(reading(dtype, i))
    return found


def float_digests() -> dict[str, str]:
    """The float paths: equal for any number of threads, but each ISA has its own order of sums."""
    found = {}
    for kind in KINDS:
        for m, n, k in ((1, 700, 300), (50, 333, 130), (129, 48, 96)):
            w = weight(kind, n, k, 32)
            for dtype in (torch.float32, torch.bfloat16):
                x = hard(m, k, torch.float32) if m > 4 else awkward((m, k))
                gradient = ops.linear_backward_input(floats((m, n), dtype), w.packed, *w.sizes)
                y = w.linear(x.to(dtype), floats((n,)), epilogue=2)
                found[f"{kind} {m} {dtype}"] = digest([y, gradient])
    return found


def main() -> None:
    by_threads = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        by_threads[threads] = {"exact": digests(), "float": float_digests()}
    kernels = [_C.kernel_name(kind.layout, 1, 8) for kind in INTEGER_KINDS]
    print(json.dumps({"isa": _C.isa(), "kernels": kernels, "threads": by_threads}))


if __name__ == "__main__":
    main()
