"""Fakes, autocast and CUDA of the ops on floats between the layers of a transformer.

The others are in `qkernels.ops`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels.ops import check_device, register_autocast, register_kernel


@torch.library.register_fake("qkernels::attention")
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    heads: int,
    scale: float,
    causal: bool,
) -> Tensor:
    check_device("attention", q, k=k, v=v, mask=mask)
    kv_heads = k.shape[2] // (q.shape[2] // heads)
    return q.new_empty([q.shape[0], q.shape[1], heads * (v.shape[2] // kv_heads)])


@torch.library.register_fake("qkernels::add_norm")
def _add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    keep_sum: bool,
) -> tuple[Tensor, Tensor]:
    check_device("add_norm", x, residual=residual, weight=weight, bias=bias)
    return x.new_empty(x.shape), x.new_empty(x.shape if keep_sum else [0])


register_autocast("attention", casts=3)

# ---- CUDA ----------------------------------------------------------------------------------------


def attention_by_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    heads: int,
    scale: float,
    causal: bool,
) -> Tensor:
    """`attention` by torch's own kernels, for devices that have none here."""
    _batch, rows, _ = q.shape
    kv_heads = k.shape[2] // (q.shape[2] // heads)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    if causal and mask is not None:  # torch takes one or the other
        later = torch.ones(rows, k.shape[1], dtype=torch.bool, device=q.device).triu(1)
        mask = mask.masked_fill(later, False if mask.dtype == torch.bool else float("-inf"))
    y = F.scaled_dot_product_attention(
        q.unflatten(2, (heads, -1)).transpose(1, 2),
        k.unflatten(2, (kv_heads, -1)).transpose(1, 2),
        v.unflatten(2, (kv_heads, -1)).transpose(1, 2),
        mask,
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=kv_heads != heads,
    )
    return y.transpose(1, 2).flatten(2).contiguous()


def add_norm_by_torch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    keep_sum: bool,
) -> tuple[Tensor, Tensor]:
    """`add_norm` by torch's own kernels, for devices that have none here."""
    total = x if residual is None else x + residual
    size, wide = x.shape[-1:], total.float()
    weight, bias = (None if t is None else t.float() for t in (weight, bias))
    if rms:
        y = F.rms_norm(wide, size, weight, eps)
        y = y if bias is None else y + bias
    else:
        y = F.layer_norm(wide, size, weight, bias, eps)
    # The results of an op are new tensors.
    kept = total.clone() if residual is None else total
    return y.to(x.dtype), kept.contiguous() if keep_sum else x.new_empty([0])


register_kernel("attention", attention_by_torch, "CUDA")
register_kernel("add_norm", add_norm_by_torch, "CUDA")
