"""Run as a script: calls of every op whose tensors lie between forbidden pages.

Prints how many calls there were. An access past a tensor ends the process with a signal.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from helpers import reference as ref
from helpers.check import same_tensor
from helpers.data import FLOATS, INTEGER_KINDS, KINDS, awkward, floats, rng, weight
from helpers.guard import guarded
from helpers.int8 import codes, orders
from ops.samples import Sample, samples

ops = torch.ops.qkernels
SIZES = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 47, 49, 63, 65, 100, 127, 513)


def calls() -> Iterator[Sample]:
    yield from samples()
    for i, cols in enumerate(SIZES):
        for form in ref.FORMATS:
            x = awkward((3, cols), FLOATS[i % 3])
            group_size = (-1, 1, 5, 16)[i % 4]
            data, scale, zero = ops.quantize(x, form.code, group_size)
            outs = {"data": data, "scale": scale, "zero_point": zero}
            yield Sample("", ops.quantize.out, (x, form.code, group_size), outs)
            options = (scale, None, form.code, group_size)
            yield Sample("", ops.quantize_with.out, (x, *options), {"out": data})
            yield Sample("", ops.dequantize.out, (data, *options), {"out": torch.empty_like(x)})
            middle = np.full(tuple(scale.shape), 3, ref.storage_dtype(form))
            zero = None if form is ref.NF4 else torch.from_numpy(middle)
            given = (scale, zero, form.code, group_size)
            yield Sample("", ops.fake_quantize.default, (x, form.code, group_size), {})
            yield Sample("", ops.fake_quantize_with.default, (x, *given), {})
            yield Sample("", ops.fake_quantize_backward.default, (x, x, *given), {})
        for j, kind in enumerate(KINDS):
            n, m = SIZES[(i + j) % len(SIZES)], (1, 2, 4, 7, 9, 17)[(i + j) % 6]
            w = weight(kind, n, cols, (-1, 1, 5, 16)[(i + j) % 4])
            yield Sample(
                "",
                ops.pack.default,
                (w.data, w.scale_tensor, w.zero_tensor, w.layout, cols, w.group_size),
                {},
            )
            yield Sample("", ops.unpack.default, (w.packed, *w.sizes), {})
            for activation in (0, 1, 2) if kind in INTEGER_KINDS else (0,):
                x = awkward((m, cols), FLOATS[(i + j) % 3])
                premul = floats((cols,)) if j % 2 else None
                perm = torch.arange(cols).flip(0) if i % 2 else None
                extra = (floats((n,), FLOATS[i % 3]), None, None, premul, perm)
                sizes = (*w.sizes, activation, i % 5)
                yield Sample("", ops.linear.default, (x, w.packed, *extra, *sizes), {})
            grad = floats((m, n), FLOATS[i % 3])
            yield Sample("", ops.linear_backward_input.default, (grad, w.packed, *w.sizes), {})
            table = (torch.tensor([n - 1, 0]), w.packed, w.layout, n, cols, w.group_size)
            yield Sample("", ops.embedding.default, (*table, FLOATS[j % 3]), {})
        a, b = (
            torch.from_numpy(rng(i, s).integers(-128, 128, s, "int8"))
            for s in ((5, cols), (cols, 19))
        )
        yield Sample("", ops.int_mm.default, (a, b), {})
        yield from on_codes(cols)


def on_codes(channels: int) -> Iterator[Sample]:
    one, zero, table = torch.tensor(0.5), torch.tensor([-3], dtype=torch.int8), codes((256,))
    for x in orders(codes((2, channels, 7, 6))):
        for kernel, stride, padding in (([3, 3], [2, 2], [1, 1]), ([2, 3], [1, 1], [0, 1])):
            sizes = (kernel, stride, padding)
            yield Sample("", ops.max_pool.default, (x, *sizes, [1, 1], True), {})
            for ranges in ((one, zero, one, zero), (one, None, None, None)):
                yield Sample("", ops.avg_pool.default, (x, *ranges, *sizes, True, False, None), {})
        yield Sample("", ops.adaptive_avg_pool.default, (x, one, zero, None, None, [3, 1]), {})
        for part in (x, x[..., :1].contiguous(), codes((channels,))):
            for out in (one, None):
                yield Sample(
                    "", ops.add.default, (part, part, one, zero, one, None, out, None, 1), {}
                )
            yield Sample("", ops.lookup.default, (part, table), {})
            scales = torch.tensor([0.5, 0.25])
            yield Sample("", ops.concat.default, ([part, part], scales, None, one, None, -1), {})


def main() -> None:
    count = 0
    for call in calls():
        for at_end in (True, False):
            inside = call.mapped(lambda t, end=at_end: guarded(t, end))
            results = [y if isinstance(y, tuple | list) else (y,) for y in (inside(), call())]
            written = [list(c.kwargs.values()) for c in (inside, call)]
            for got, want in zip(*results, strict=True):
                assert (got is None) == (want is None)
                if got is not None:
                    same_tensor(got.detach(), want.detach())
            for got, want in zip(*written, strict=True):
                if isinstance(got, torch.Tensor):
                    same_tensor(got, want)
            count += 1
    print(count)


if __name__ == "__main__":
    main()
