"""At least one call of every op and overload, for the tests that go over all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from helpers import reference as ref
from helpers.conv import Geometry, conv_weight
from helpers.data import INTEGER_KINDS, KINDS, floats, rng, weight
from helpers.int8 import codes, orders

ops = torch.ops.qkernels


@dataclass(frozen=True)
class Sample:
    name: str
    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        overload = self.op._overloadname
        op = (
            self.op.__name__ if overload != "default" else self.op.__name__.removesuffix(".default")
        )
        return f"{op}-{self.name}"

    @property
    def tensors(self) -> list[Tensor]:
        found = []
        for value in (*self.args, *self.kwargs.values()):
            found += [
                t for t in (value if isinstance(value, list) else [value]) if isinstance(t, Tensor)
            ]
        return found

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Sample:
        """The same call with other tensors."""

        def changed(value: Any) -> Any:
            if isinstance(value, list):
                return [changed(v) for v in value]
            return change(value) if isinstance(value, Tensor) else value

        args = tuple(map(changed, self.args))
        kwargs = {k: changed(v) for k, v in self.kwargs.items()}
        return Sample(self.name, self.op, args, kwargs)

    def __call__(self) -> Any:
        return self.op(*self.args, **self.kwargs)


def samples() -> list[Sample]:
    return [
        *quantizers(),
        *fakes(),
        *weights(),
        *products(),
        *linears(),
        *convolutions(),
        *int8_ops(),
        *transformer_ops(),
    ]


def quantizers() -> list[Sample]:
    found = []

    def add(name: str, op: Any, *args: Any, **kwargs: Any) -> None:
        found.append(Sample(name, op, args, kwargs))

    for form in ref.FORMATS:
        for group_size in (None, -1, 4):
            x = floats((3, 11))
            name = f"{form.name}-{group_size}"
            symmetric = form is ref.NF4 or group_size != -1
            options = (form.code, group_size, symmetric, torch.bfloat16)
            data, scale, zero = ops.quantize(x, *options)
            given = None if symmetric else zero
            add(name, ops.quantize.default, x, *options)
            add(name, ops.quantize_with.default, x, scale, given, form.code, group_size)
            add(
                name,
                ops.dequantize.default,
                data,
                scale,
                given,
                form.code,
                group_size,
                11,
                torch.float16,
            )
            outs = {"data": data.clone(), "scale": scale.clone(), "zero_point": zero.clone()}
            add(name, ops.quantize.out, x, form.code, group_size, symmetric, **outs)
            add(
                name,
                ops.quantize_with.out,
                x,
                scale,
                given,
                form.code,
                group_size,
                out=data.clone(),
            )
            y = torch.empty(3, 11)
            add(name, ops.dequantize.out, data, scale, given, form.code, group_size, out=y)
    add("defaults", ops.quantize.default, floats((2, 3, 8)), 0)
    return found


def fakes() -> list[Sample]:
    found = []
    for form in ref.FORMATS:
        for group_size in (None, -1, 4):
            x, grad = floats((3, 11)), floats((3, 11), seed="grad")
            name = f"{form.name}-{group_size}"
            symmetric = form is ref.NF4 or group_size != -1
            options = (form.code, group_size, symmetric, torch.bfloat16)
            found.append(Sample(name, ops.fake_quantize.default, (x, *options), {}))
            _, scale, zero = ops.quantize(x, *options)
            given = (scale, None if symmetric else zero, form.code, group_size)
            found.append(Sample(name, ops.fake_quantize_with.default, (x, *given), {}))
            found.append(Sample(name, ops.fake_quantize_backward.default, (grad, x, *given), {}))
    x, scale, zero = floats((3, 11)), torch.full((3, 3), 0.2), torch.full((3, 3), 7.3)
    for wanted in ((x,), (scale, zero), (x, scale, zero)):
        trained = [t.clone().requires_grad_(any(t is w for w in wanted)) for t in (x, scale, zero)]
        op = ops.fake_quantize_with.default
        found.append(Sample(f"learned {len(wanted)}", op, (*trained, 1, 4), {}))
    op = ops.fake_quantize.default
    found.append(Sample("trained", op, (x.clone().requires_grad_(), 1, 4), {}))
    return found


def weights() -> list[Sample]:
    found = []
    for kind in KINDS:
        w = weight(kind, 19, 21, 8)
        layout, k, n, group_size = w.sizes
        pack = (w.data, w.scale_tensor, w.zero_tensor, layout, k, group_size)
        found.append(Sample(str(kind), ops.pack.default, pack, {}))
        found.append(Sample(str(kind), ops.unpack.default, (w.packed, *w.sizes), {}))
        indices = torch.tensor([[3, 0], [18, 3]])
        table = (indices, w.packed, layout, n, k, group_size, torch.bfloat16)
        found.append(Sample(str(kind), ops.embedding.default, table, {}))
        gradient = (floats((2, 3, n)), w.packed, *w.sizes)
        found.append(Sample(str(kind), ops.linear_backward_input.default, gradient, {}))
    return found


def products() -> list[Sample]:
    a, b = (torch.from_numpy(rng(s).integers(-128, 128, s, "int8")) for s in ((5, 9), (9, 7)))
    return [Sample("plain", ops.int_mm.default, (a, b), {})]


def linears() -> list[Sample]:
    found = []

    def add(
        name: str, op: Any, x: Tensor, w: Any, *extra: Any, codes: tuple[int, int] = (0, 0)
    ) -> None:
        found.append(Sample(name, op, (x, w.packed, *extra, *w.sizes, *codes), {}))

    bias, premul, perm = floats((19,)), torch.exp(floats((21,))), torch.arange(21).flip(0)
    scale, zero = torch.tensor(0.03), torch.tensor([5], dtype=torch.int8)
    nothing = (None, None, None, None, None)
    for kind in KINDS:
        w = weight(kind, 19, 21, 8)
        add(f"{kind}", ops.linear.default, floats((2, 3, 21)), w, *nothing)
        if kind in INTEGER_KINDS:
            add(f"{kind}-int8", ops.linear.default, floats((4, 21)), w, *nothing, codes=(1, 2))
    w = weight(KINDS[4], 19, 21, 8)
    x = floats((4, 21), torch.bfloat16)
    add("static", ops.linear.default, x, w, bias, scale, zero, None, None, codes=(2, 1))
    add("everything", ops.linear.default, x, w, bias, None, None, premul, perm, codes=(1, 3))
    add("vector", ops.linear.default, floats((21,)), w, *nothing, codes=(1, 4))
    add("no rows", ops.linear.default, floats((0, 21)), w, *nothing)

    for kind in (KINDS[0], INTEGER_KINDS[-1]):
        weights = [weight(kind, rows, 21, 8) for rows in (19, 5)]
        sizes = (weights[0].layout, 21, [19, 5], 8)
        for x in (floats((2, 3, 21)), floats((0, 21), torch.bfloat16)):
            args = (x, [w.packed for w in weights], [None, floats((5,))], *sizes, 0, [0, 2])
            found.append(Sample(f"{kind}-{len(x)}", ops.linear_shared.default, args, {}))

    op = ops.linear_differentiable.default
    for wants_x in (True, False):
        for wants_bias in (True, False):
            x = floats((4, 21)).requires_grad_(wants_x)
            b = bias.clone().requires_grad_(wants_bias)
            name = f"x {wants_x}, bias {wants_bias}"
            add(name, op, x, w, b, None, None, premul, perm, codes=(1, 0))
    x = floats((2, 3, 21), torch.bfloat16).requires_grad_()
    add("float", op, x, weight(KINDS[6], 19, 21, 8), *nothing)
    add("static", op, x, w, bias, scale, zero, None, None, codes=(2, 0))
    return found


def convolutions() -> list[Sample]:
    found = []
    image = Geometry((5, 6), (3, 2), (2, 1), (1, 0), (1, 1), (1, 2), groups=2, group_channels=3)
    depthwise = Geometry((7,), (3,), (1,), (1,), (1,), (1,), 9, 1, 1)
    spread = Geometry((4, 3, 3), (2, 2, 2), (2, 1, 1), *[(0, 0, 0)] * 2, (1, 1, 1), transposed=True)

    def add(name: str, op: Any, *args: Any) -> None:
        found.append(Sample(name, op, args, {}))

    for geometry in (image, depthwise, spread):
        for kind in (KINDS[0], KINDS[4]):
            w = conv_weight(geometry, kind, -1 if kind is KINDS[0] else 5)
            taps, channels, groups, group_size = w.sizes
            name = f"{kind}-{len(geometry.size)}d"
            add(name, ops.pack_conv.default, *w.stored, kind.layout, *w.sizes)
            sizes = (kind.layout, taps, channels, groups, geometry.outputs, group_size)
            add(name, ops.unpack_conv.default, w.packed, *sizes)
            add(name, ops.conv.default, *w.arguments(geometry.input()))
            x = geometry.input().requires_grad_()
            bias = floats((geometry.outputs,)).requires_grad_()
            add(name, ops.conv_differentiable.default, *w.arguments(x, bias))
        w = conv_weight(geometry, KINDS[0])
        name = f"int8-{len(geometry.size)}d"
        x = geometry.input(torch.bfloat16)
        add(name, ops.conv.default, *w.arguments(x, activation=2, epilogue=5))
        x = geometry.input().requires_grad_()
        add(name, ops.conv_differentiable.default, *w.arguments(x, activation=1))
    w = conv_weight(image, KINDS[0])
    codes = torch.ones(2, 6, 5, 6, dtype=torch.int8).contiguous(memory_format=torch.channels_last)
    residual = torch.ones(2, 16, *image.out, dtype=torch.int8)
    ranges = (0.5, 1, 0.25, 2, 0.125, 3)
    add("codes", ops.conv.default, *w.arguments(codes, None, residual, *ranges, 2, 1))
    add(
        "to bfloat16",
        ops.conv.default,
        *w.arguments(codes, x_scale=0.5, activation=1),
        torch.bfloat16,
    )
    w = conv_weight(Geometry((5, 6), (3, 2), (1, 1), (1, 1), (1, 0), (1, 1), 1, 16, 16), KINDS[0])
    for layout in orders(torch.ones(2, 16, 5, 6, dtype=torch.int8)):
        call = w.arguments(layout, None, None, 0.5, 1, 0.25, None, 0.125, 3, 2, 1)
        add(f"codes-{layout.stride(1)}", ops.conv_sequence.default, *sequence(call))
    return found


def sequence(call: tuple[Any, ...]) -> tuple[Any, ...]:
    """Three steps of the same convolution, the last with the first's result added."""
    settings = [
        n
        for value in call[11:]
        for n in ([len(value), *value] if isinstance(value, list) else [int(value)])
    ]
    constants = [*call[1:3], *call[4:10]]
    wiring = [0, -1, 1, -1, 2, 1]
    plain = [None if i == 4 else tensor for i, tensor in enumerate(constants)]
    return [call[0]], plain * 2 + constants, call[10], wiring, settings * 3, [1, 3]


def int8_ops() -> list[Sample]:
    found = []

    def add(name: str, op: Any, *args: Any) -> None:
        found.append(Sample(name, op.default, args, {}))

    one, two = torch.tensor(0.5), torch.tensor(0.25)
    zero, table = torch.tensor([-3], dtype=torch.int8), codes((256,))
    for size in ((9,), (9, 8), (5, 4, 6)):
        dims = len(size)
        for x in orders(codes((2, 19, *size))):
            name = f"{dims}d-{'contiguous' if x.is_contiguous() else 'channels_last'}"
            threes, twos, ones = ([n] * dims for n in (3, 2, 1))
            for ceil in (False, True):
                add(f"{name}-{ceil}", ops.max_pool, x, threes, twos, ones, ones, ceil)
                means = (x, one, zero, two, None, threes, twos, ones, ceil)
                add(f"{name}-{ceil}", ops.avg_pool, *means, False, None)
            means = (x, one, None, None, None, twos, twos, ones, False, True, 7)
            add(f"{name}-float", ops.avg_pool, *means, torch.bfloat16)
            add(name, ops.adaptive_avg_pool, x, one, zero, two, zero, threes)
            add(f"{name}-float", ops.adaptive_avg_pool, x, one, None, None, None, ones)
            add(name, ops.add, x, x, one, zero, two, None, two, zero, 1)
            floats_out = (one, None, two, zero, None, None, 4, torch.float16)
            add(f"{name}-float", ops.add, x, codes(tuple(x.shape), 1), *floats_out)
            add(name, ops.lookup, x, table)
            both = (torch.tensor([0.5, 0.25]), torch.tensor([1, -3], dtype=torch.int8), two, zero)
            for dim in (0, 1, -1):
                add(f"{name}-{dim}", ops.concat, [x, x], *both, dim)
    add("alone", ops.concat, [codes((3,))], torch.tensor([0.5]), None, two, None, 0)
    return found


def transformer_ops() -> list[Sample]:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        q, k, v = (
            floats((2, rows, size), dtype, rows) for rows, size in ((5, 24), (7, 12), (7, 10))
        )
        for mask in (None, torch.ones(7, dtype=torch.bool), floats((2, 1, 5, 7))):
            for causal in (False, True):
                args = (q, k, v, mask, 4, 0.4, causal)
                label = f"{name}-{'none' if mask is None else mask.dtype}-{causal}"
                found.append(Sample(label, ops.attention.default, args, {}))
        one = (q[:, :1], k, v, None, 4, 0.4, False)
        found.append(Sample(f"{name}-one row", ops.attention.default, one, {}))
        x, residual, weight = floats((2, 3, 70), dtype), floats((2, 3, 70), dtype, 1), floats((70,))
        for rms in (False, True):
            for keep in (False, True):
                for r in (None, residual):
                    args = (x, r, weight, None if rms else weight, 1e-5, rms, keep)
                    label = f"{name}-{rms}-{keep}-{r is not None}"
                    found.append(Sample(label, ops.add_norm.default, args, {}))
        found.append(Sample(name, ops.op_sequence.default, encoder_layer(dtype), {}))
    return found


def encoder_layer(dtype: torch.dtype) -> tuple[Any, ...]:
    """Three layers of x, attention with their results, a layer, and x added to it and normed."""
    w = weight(KINDS[0], 24, 24)
    inputs = [floats((2, 5, 24), dtype), w.packed, floats((24,)), floats((24,), torch.float32, 1)]
    x, packed, bias, factor = (2 * value for value in range(4))
    last = [2 * value + 1 for value in range(9)]  # values that are read for the last time
    shared = [1, 3, x, packed, packed, packed, bias, -1, bias, w.layout, 24, 24, 24, 24, -1, 1]
    program = [
        *(*shared, 0, 0, 2),
        *(2, last[4], 2 * 5, last[6], -1, 4, 0),
        *(0, last[7], packed, -1, -1, -1, -1, -1, w.layout, 24, 24, -1, 1, 0),
        *(3, last[8], last[0], factor, last[3], 0, 1),
    ]
    return inputs, program, [0.4, 1e-5], [5, 9, 10]
