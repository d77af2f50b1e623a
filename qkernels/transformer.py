"""Attention and normalization of float tensors, as they stand between a transformer's layers."""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.ops import refuse_forward_mode

__all__ = ["add_norm", "attention"]

_ATTENTION = torch.ops.qkernels.attention.default
_ADD_NORM = torch.ops.qkernels.add_norm.default


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    heads: int,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """Scaled dot-product attention of rows in which the heads lie side by side.

    This is `softmax(scale * q @ k.T + mask) @ v` for each head, in float32, without views or copies
    around it: q, k and v may be slices of one product. It has no gradient.

    Args:
        q: float32, bfloat16 or float16 [batch, rows, heads * features], of any strides.
        k: [batch, keys, kv_heads * features] in the type of q, with as many features for each head.
            `kv_heads` divides `heads`: so many heads of q in a row share one (grouped-query
            attention).
        v: [batch, keys, kv_heads * value features] in the type of q.
        mask: what broadcasts to [batch, heads, rows, keys]: bool, True where a row attends to a
            key, or float32, bfloat16 or float16, which is added to the scores. Or None.
        heads: heads of q.
        scale: factor of the scores; None for `1 / sqrt(features)`.
        causal: row i attends to keys up to i only, besides the mask.

    Returns:
        [batch, rows, heads * value features] in the type of q, contiguous. A row that attends to
        nothing is 0.

    Raises:
        RuntimeError: a tensor that requires a gradient while gradients are recorded, or tensors
            that do not fit together.

    Source: Vaswani et al., "Attention Is All You Need", 2017; Ainslie et al., "GQA", 2023.

    Example:
        >>> qkv = torch.randn(2, 5, 3 * 8)
        >>> attention(*qkv.split(8, -1), heads=2).shape
        torch.Size([2, 5, 8])
    """
    _refuse_gradient("attention", "torch's scaled_dot_product_attention", q, k, v, mask)
    if scale is None:
        scale = (q.shape[-1] / heads) ** -0.5 if heads > 0 and q.shape[-1] > 0 else 1.0
    out: Tensor = _ATTENTION(q, k, v, mask, heads, scale, causal)
    return out


def add_norm(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    rms: bool = False,
    keep_sum: bool = False,
) -> tuple[Tensor, Tensor]:
    """LayerNorm or RMSNorm over the last dimension of `x + residual`, in one pass over memory.

    The sum is rounded to the type of x before it is normalized, as it is when torch adds the two.
    All else is float32 and rounded once. It has no gradient.

    Args:
        x: float32, bfloat16 or float16 [..., features].
        residual: of the shape and type of x, or None.
        weight: [features], float32 or of the type of x, or None for 1.
        bias: [features], of the type of `weight`, or None for 0.
        eps: is added to the variance, or to the mean square.
        rms: RMSNorm: the mean is not subtracted.
        keep_sum: whether `x + residual` is returned too.

    Returns:
        The normalized tensor, and `x + residual`: both as x, contiguous. The latter is empty, [0],
        unless it is kept.

    Raises:
        RuntimeError: a tensor that requires a gradient while gradients are recorded, or tensors
            that do not fit together.

    Source: Ba, Kiros and Hinton, "Layer Normalization", 2016; Zhang and Sennrich, "Root Mean Square
    Layer Normalization", 2019.

    Example:
        >>> y, total = add_norm(torch.tensor([[1.0, 2.0]]), torch.ones(1, 2), keep_sum=True)
        >>> y.round(decimals=2), total
        (tensor([[-1.,  1.]]), tensor([[2., 3.]]))
    """
    _refuse_gradient("add_norm", "torch's layer_norm or rms_norm", x, residual, weight, bias)
    out: tuple[Tensor, Tensor] = _ADD_NORM(x, residual, weight, bias, eps, rms, keep_sum)
    return out


def _refuse_gradient(op: str, instead: str, *tensors: Tensor | None) -> None:
    """Torch would go on without a gradient, and say so in a warning at best."""
    refuse_forward_mode(op)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            f"qkernels::{op} has no gradient but a tensor that it was given requires one; call it "
            f"under torch.no_grad(), or train with {instead}"
        )
