"""Gradients: dx = dy · W, dequantized, and the bias's; quantizing x counts as the identity."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import reference as ref
from helpers.check import float_path_bound, same_tensor, within
from helpers.data import (
    FEATURES_IN,
    FEATURES_OUT,
    FLOATS,
    GROUPS,
    INTEGER_KINDS,
    KINDS,
    ROWS,
    Kind,
    Weight,
    floats,
    rng,
    strided,
    weight,
)
from qkernels import _C

ops = torch.ops.qkernels


def check_input_gradient(w: Weight, grad: torch.Tensor) -> None:
    got = ops.linear_backward_input(grad, w.packed, *w.sizes)
    assert got.dtype == grad.dtype
    assert got.shape == (*grad.shape[:-1], w.k)
    dy = ref.values(grad).reshape(int(np.prod(grad.shape[:-1])), w.n).astype(np.float64)
    exact = w.exact()
    # The weight itself is rounded once: one more term.
    bound = float_path_bound(dy, exact.T, 1)
    if _C.isa() == "avx512bf16" and grad.dtype == torch.bfloat16:  # the weight becomes bfloat16
        lost = 2.0**-126 * (w.n + np.abs(exact).sum(axis=0) + np.abs(dy).sum(axis=1, keepdims=True))
        bound = bound + 2.0**-8 * (np.abs(dy) @ np.abs(exact)) + lost
    within(got, (dy @ exact).reshape(got.shape), bound.reshape(got.shape))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_input_gradient(kind: Kind, dtype: torch.dtype) -> None:
    for i, n in enumerate(FEATURES_OUT):
        for j, k in enumerate(FEATURES_IN):
            w = weight(kind, n, k, GROUPS[(i + j) % len(GROUPS)])
            m = ROWS[(i * len(FEATURES_IN) + j) % len(ROWS)]
            if m * n * k <= 49 * 100 * 1000:
                check_input_gradient(w, floats((m, n), dtype, seed=(i, j)))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_large_input_gradients(kind: Kind) -> None:
    """More outputs, and more rows, than are taken at a time."""
    for m, n, k in ((3, 255, 70), (3, 256, 70), (7, 257, 130), (2, 700, 33), (800, 20, 70)):
        check_input_gradient(weight(kind, n, k, 32), floats((m, n)))
        check_input_gradient(weight(kind, n, k, 32), floats((m, n), torch.bfloat16))


@pytest.mark.parametrize("shape", [(35,), (1, 35), (3, 5, 35), (2, 3, 4, 35), (0, 35), (2, 0, 35)])
def test_any_batch_rank(shape: tuple[int, ...]) -> None:
    for kind in KINDS:
        check_input_gradient(weight(kind, 35, 70, 32), floats(shape))


@pytest.mark.parametrize("group_size", [24, 48, -1])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_weight_is_at_its_place(kind: Kind, group_size: int) -> None:
    """With bfloat16 too, where groups of a multiple of 16 take a way of their own."""
    for n, k in ((1, 1), (51, 150), (300, 601)):
        w = weight(kind, n, k, group_size)
        got = ops.linear_backward_input(torch.eye(n), w.packed, *w.sizes)
        rows = ops.dequantize(
            w.data, w.scale_tensor, w.zero_tensor, kind.form.code, group_size, k, torch.float32
        )
        assert torch.equal(got, rows)
        half = ops.linear_backward_input(torch.eye(n).bfloat16(), w.packed, *w.sizes)
        assert torch.equal(half, rows.bfloat16())


def test_any_strides() -> None:
    for kind in KINDS:
        w = weight(kind, 35, 70, 32)
        grad = floats((13, 35))
        want = ops.linear_backward_input(grad, w.packed, *w.sizes)
        for name, view in strided(grad):
            assert torch.equal(view, grad), name
            same_tensor(ops.linear_backward_input(view, w.packed, *w.sizes), want)
        ones = ops.linear_backward_input(torch.ones(13, 35), w.packed, *w.sizes)
        # What sum().backward() hands over.
        expanded = ops.linear_backward_input(torch.ones(()).expand(13, 35), w.packed, *w.sizes)
        same_tensor(expanded, ones)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_against_autograd_in_float64(kind: Kind, dtype: torch.dtype) -> None:
    """Through premul, perm and bias, at every batch rank, for both uses of an input twice."""
    n, k = 35, 70
    w = weight(kind, n, k, 32)
    exact = torch.from_numpy(w.exact())
    premul = torch.exp(floats((k,), seed="premul"))
    perm = torch.from_numpy(rng("perm", k).permutation(k))
    repeated = torch.from_numpy(rng("repeated", k).integers(0, k, k))
    activations = (0, 1, 2) if kind in INTEGER_KINDS else (0,)
    for shape in ((k,), (5, k), (2, 3, k), (0, k)):
        for by, at in ((None, None), (premul, None), (None, perm), (premul, repeated)):
            for activation in activations:
                x = floats(shape, dtype).requires_grad_()
                bias = floats((n,), torch.float32).requires_grad_()
                dy = floats((*shape[:-1], n), dtype, seed="dy")
                y = w.linear(
                    x, bias, activation=activation, premul=by, perm=at, differentiable=True
                )
                y.backward(dy)

                x64 = x.detach().double().requires_grad_()
                b64 = bias.detach().double().requires_grad_()
                mixed = x64 if by is None else x64 * by.double()
                mixed = mixed if at is None else mixed[..., at]
                torch.nn.functional.linear(mixed, exact, b64).backward(dy.double())
                # The size of what is added up: products of magnitudes, and roundings in between.
                magnitude = dy.double().abs() @ exact.abs()
                if at is not None:
                    magnitude = torch.zeros_like(magnitude).index_add(-1, at, magnitude)
                magnitude = magnitude if by is None else magnitude * by.double()
                unit = {torch.float32: 2.0**-18, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
                assert x.grad.dtype == dtype
                assert bias.grad.dtype == torch.float32
                within(x.grad, x64.grad.numpy(), (unit[dtype] * magnitude).numpy())
                total = dy.double().abs().reshape(-1, n).sum(0)
                within(bias.grad, b64.grad.numpy(), (unit[dtype] * total).numpy())


def test_bias_types_and_who_gets_a_gradient() -> None:
    w = weight(KINDS[0], 35, 70)
    for bias_dtype in FLOATS:
        x = floats((5, 70), torch.bfloat16)
        bias = floats((35,), bias_dtype).requires_grad_()
        y = w.linear(x, bias, differentiable=True)
        y.sum().backward()
        assert bias.grad.dtype == bias_dtype
        assert (bias.grad == 5).all()
        assert x.grad is None
    x = floats((5, 70)).requires_grad_()
    w.linear(x, floats((35,)), differentiable=True).sum().backward()
    assert x.grad is not None
    assert not w.linear(floats((5, 70)), None, differentiable=True).requires_grad


def test_no_node_without_need() -> None:
    """Inference must not pay for autograd, and no_grad means none."""
    w = weight(KINDS[0], 35, 70)
    x = floats((5, 70)).requires_grad_()
    with torch.no_grad():
        assert w.linear(x, differentiable=True).grad_fn is None
    with torch.inference_mode():
        assert w.linear(x, differentiable=True).grad_fn is None
    assert w.linear(x.detach(), differentiable=True).grad_fn is None
    assert w.linear(x.detach()).grad_fn is None


def test_an_epilogue_has_no_gradient_here() -> None:
    w = weight(KINDS[0], 35, 70)
    x = floats((5, 70))
    for epilogue in range(1, 5):
        with pytest.raises(RuntimeError, match="epilogue must be 0 .* apply the activation"):
            w.linear(x.clone().requires_grad_(), epilogue=epilogue, differentiable=True)
        same_tensor(
            w.linear(x, epilogue=epilogue, differentiable=True), w.linear(x, epilogue=epilogue)
        )


def test_same_numbers_as_linear() -> None:
    for kind in KINDS:
        w = weight(kind, 35, 70, 32)
        x, bias = floats((5, 70)), floats((35,))
        for activation in (0, 1, 2) if kind in INTEGER_KINDS else (0,):
            got = w.linear(
                x.clone().requires_grad_(), bias, activation=activation, differentiable=True
            )
            same_tensor(got.detach(), w.linear(x, bias, activation=activation))


def test_training_through_two_layers_moves_the_loss() -> None:
    first, second = weight(KINDS[0], 32, 24), weight(KINDS[4], 8, 32, 16)
    bias = torch.zeros(32, requires_grad=True)
    x, target = floats((64, 24)), floats((64, 8), seed="target")
    losses = []
    for _ in range(20):
        hidden = torch.relu(first.linear(x, bias, activation=1, differentiable=True))
        y = second.linear(hidden, activation=1, differentiable=True)
        loss = torch.nn.functional.mse_loss(y, target)
        (gradient,) = torch.autograd.grad(loss, bias)
        losses.append(loss.item())
        bias = (bias - 0.2 * gradient).detach().requires_grad_()
    assert losses[-1] < 0.9 * losses[0]


@given(data=st.data())
def test_drawn(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    m, n, k = (data.draw(st.integers(0, top)) for top in (20, 60, 150))
    w = weight(kind, n, k, data.draw(st.just(-1) | st.integers(1, 160)))
    check_input_gradient(w, floats((m, n), data.draw(st.sampled_from(FLOATS))))
