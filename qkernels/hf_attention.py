"""`qkernels::attention` as an attention function of transformers; `qkernels.hf` imports it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "qkernels"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ATTENTION = torch.ops.qkernels.attention.default
# What only torch's attention, or neither, knows about.
_OTHERS = ("position_bias", "cache", "softcap", "output_attentions")


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for `model.set_attn_implementation("qkernels")`.

    Where a gradient, dropout, another device or dtype, or an argument that only it knows asks for
    it, transformers' own "sdpa" computes.

    Args:
        module: the attention module.
        query: [batch, heads, rows, features], of any strides.
        key: [batch, kv_heads, keys, features].
        value: [batch, kv_heads, keys, value features].
        attention_mask: bool or float, what broadcasts to [batch, heads, rows, keys], or None.
        dropout: probability with which a weight is left out.
        scaling: factor of the scores; None for `1 / sqrt(features)`.
        is_causal: None for what the module says.
        kwargs: of the attention functions of transformers.

    Returns:
        [batch, rows, heads, value features], and None for the weights.

    Raises:
        ValueError: the model has attention sinks (`s_aux`), which neither of them computes.
    """
    if kwargs.get("s_aux") is not None:
        raise ValueError(
            "attention of qkernels: the model gives attention sinks (s_aux), which it does not "
            'compute; call model.set_attn_implementation("eager")'
        )
    if dropout or _is_for_torch(query, key, value, attention_mask, kwargs):
        return sdpa_attention_forward(  # type: ignore[no-any-return, unused-ignore]
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    heads, rows, features = query.shape[1:]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    y = _ATTENTION(
        query.transpose(1, 2).flatten(2),
        key.transpose(1, 2).flatten(2),
        value.transpose(1, 2).flatten(2),
        attention_mask,
        heads,
        features**-0.5 if scaling is None else scaling,
        bool(is_causal and attention_mask is None and rows > 1),
    )
    return y.unflatten(2, (heads, -1)), None


def _is_for_torch(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> bool:
    dtype = query.dtype
    if dtype not in _DTYPES or key.dtype != dtype or value.dtype != dtype or not query.is_cpu:
        return True
    if query.shape[0] != key.shape[0] or (mask is not None and mask.dim() > 4):
        return True
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (query, key, value, mask)
    ):
        return True
    return any(kwargs.get(n) is not None and kwargs[n] is not False for n in _OTHERS)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
