"""Multi-head attention whose projections are layers of their own, so that they can be quantized."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkernels.nn.carry import carry_over, has_hooks, why_not_replaceable, why_not_whole
from qkernels.nn.linear import QLinear
from qkernels.schemes import Scheme

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
_WHOLE_OUT = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


class QMultiheadAttention(nn.Module):
    """`nn.MultiheadAttention` with layers in the place of its bare weights.

    `q_proj`, `k_proj`, `v_proj` and `out_proj` are `QLinear` layers, or `nn.Linear` ones that
    anything may be done to that is done to such layers. `quantize_` puts it in the place of
    `nn.MultiheadAttention`, and `dequantize_` takes it away. As for torch's module with separate
    weights, `in_proj_weight` and `in_proj_bias` are None.

    Args:
        embed_dim: features of the query and of the result, a multiple of `num_heads`.
        num_heads: parallel heads.
        dropout: probability, of attention weights in training.
        bias: whether the projections have biases.
        add_bias_kv: whether a learned key and value follow those that are given.
        add_zero_attn: whether a key and a value of zeros follow them.
        kdim: features of the key, by default embed_dim.
        vdim: features of the value, by default embed_dim.
        batch_first: whether batched tensors are [batch, length, features], not [length, batch,
            features].
        device: "cpu", "cuda" or "meta".
        dtype: of the float parameters.
        scheme: of all four projections; None for `nn.Linear` layers.

    Raises:
        ValueError: sizes that do not fit, or a projection too long for the scheme.

    Example:
        >>> attention = qk.nn.QMultiheadAttention(64, 4, batch_first=True, scheme=qk.W8A8())
        >>> x = torch.randn(2, 10, 64)
        >>> y, weights = attention(x, x, x)
        >>> y.shape, weights.shape
        (torch.Size([2, 10, 64]), torch.Size([2, 10, 10]))
    """

    # Torch's fused paths ask for these, see `settle_fast_paths`.
    hides_weight = True
    in_proj_weight = None
    in_proj_bias = None
    _qkv_same_embed_dim = False

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        scheme: Scheme | None = None,
    ) -> None:
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
            raise ValueError(
                f"QMultiheadAttention: embed_dim is {embed_dim} and num_heads is {num_heads}; "
                "expected positive numbers, embed_dim a multiple of num_heads"
            )
        super().__init__()
        self.embed_dim = embed_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.dropout = dropout
        self.batch_first = batch_first
        self.add_zero_attn = add_zero_attn
        sizes = (embed_dim, self.kdim, self.vdim, embed_dim)
        for name, in_features in zip(PROJECTIONS, sizes, strict=True):
            layer: nn.Linear | QLinear
            if scheme is None:
                layer = nn.Linear(in_features, embed_dim, bias, device, dtype)
            else:
                layer = QLinear(in_features, embed_dim, bias, scheme, device, dtype)
            setattr(self, name, layer)
        for name in ("bias_k", "bias_v"):
            made = nn.Parameter(torch.zeros(1, 1, embed_dim, device=device, dtype=dtype))
            self.register_parameter(name, made if add_bias_kv else None)
        if not next(self.parameters()).is_meta:
            self.reset_parameters()

    @classmethod
    @torch.inference_mode(False)  # what is made must be usable outside of it
    def from_float(
        cls, attention: nn.MultiheadAttention, scheme: Scheme | None = None
    ) -> QMultiheadAttention:
        """The same attention, with its weights in layers of their own.

        Args:
            attention: torch's module, which stays as it is.
            scheme: how to quantize the projections, or None to leave them float.

        Raises:
            TypeError: not an `nn.MultiheadAttention`, or a subclass of it.
            ValueError: it holds more than its weights, or they cannot be quantized.

        Example:
            >>> qk.nn.QMultiheadAttention.from_float(nn.MultiheadAttention(64, 4), qk.W8A8()).kdim
            64
        """
        reason = why_not_splittable(attention)
        if reason is not None:
            error = ValueError if type(attention) is nn.MultiheadAttention else TypeError
            raise error(
                f"QMultiheadAttention.from_float: got {type(attention).__name__}, which cannot be "
                f"replaced: {reason}"
            )
        new = cls.viewing(attention, {})
        new.own_memory()
        if scheme is not None:
            for name in PROJECTIONS:
                setattr(new, name, QLinear.from_float(getattr(new, name), scheme))
        return new

    @classmethod
    def viewing(
        cls, attention: nn.MultiheadAttention, made: dict[object, nn.Parameter]
    ) -> QMultiheadAttention:
        """The same attention with float layers whose weights are views of the module's.

        Args:
            attention: torch's module.
            made: parameters by what they are a view of, so that modules that share a weight share
                its views; those of this module are added.
        """
        own = attention._parameters
        weight, bias = own["in_proj_weight"], own["in_proj_bias"]
        new = cls(
            attention.embed_dim,
            attention.num_heads,
            attention.dropout,
            bias is not None,
            add_zero_attn=attention.add_zero_attn,
            kdim=attention.kdim,
            vdim=attention.vdim,
            batch_first=attention.batch_first,
            device="meta",
        )
        for i, name in enumerate(PROJECTIONS):
            layer: nn.Linear = getattr(new, name)
            if name == "out_proj":
                layer.weight, layer.bias = attention.out_proj.weight, attention.out_proj.bias
                continue
            rows = slice(i * new.embed_dim, (i + 1) * new.embed_dim)
            if weight is None:
                layer.weight = getattr(attention, f"{name}_weight")
            else:
                layer.weight = _view(weight, rows, made)
            if bias is not None:
                layer.bias = _view(bias, rows, made)
        new.bias_k, new.bias_v = own.get("bias_k"), own.get("bias_v")
        carry_over(attention, new, ("_qkv_same_embed_dim", "bias_k", "bias_v"))
        return new

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights as `nn.MultiheadAttention` does, and quantize them."""
        out = self.out_proj
        assert isinstance(out, QLinear | nn.Linear)
        like = out.packed if isinstance(out, QLinear) else out.weight
        whole = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            bias=out.bias is not None,
            add_bias_kv=self.bias_k is not None,
            kdim=self.kdim,
            vdim=self.vdim,
            device=like.device,
            dtype=out.dtype if isinstance(out, QLinear) else like.dtype,
        )
        drawn = self.viewing(whole, {})
        for name in PROJECTIONS:
            layer, new = getattr(self, name), getattr(drawn, name)
            if isinstance(layer, QLinear):
                layer.set_weight(new.weight)
            else:
                layer.weight.copy_(new.weight)
            if layer.bias is not None:
                layer.bias.copy_(new.bias)
        for name in ("bias_k", "bias_v"):
            if self._parameters[name] is not None:
                getattr(self, name).copy_(getattr(whole, name))

    @torch.inference_mode(False)
    def own_memory(self) -> None:
        """Give parameters of the projections that are views of others memory of their own."""
        for name in PROJECTIONS[:3]:
            own = getattr(self, name)._parameters
            for parameter in (own.get("weight"), own.get("bias")):
                if parameter is None or parameter.untyped_storage().nbytes() == parameter.nbytes:
                    continue
                parameter.data = parameter.data.clone()

    def why_not_float(self) -> str | None:
        """Why `to_float` cannot give torch's module, or None."""
        layers: list[nn.Module] = [getattr(self, name) for name in PROJECTIONS]
        for name, layer in zip(PROJECTIONS, layers, strict=True):
            if type(layer) not in _WHOLE_OUT:
                return f"{name} is a {type(layer).__name__}; expected an nn.Linear"
            reason = why_not_replaceable(layer)
            if reason is not None or has_hooks(layer):
                return f"{name} cannot be taken apart: {reason or 'it has hooks'}"
        if len({(p.dtype, p.device) for layer in layers for p in layer.parameters()}) > 1:
            return "its parameters differ in dtype or device"
        if len({layer._parameters["bias"] is None for layer in layers}) > 1:
            return "some projections have a bias and some have none"
        return None

    def to_float(self) -> nn.MultiheadAttention:
        """Torch's module with the weights of the projections, which must be float.

        Raises:
            ValueError: they are not, or they differ in what torch has once for all of them.

        Example:
            >>> type(qk.nn.QMultiheadAttention(8, 2).to_float()).__name__
            'MultiheadAttention'
        """
        reason = self.why_not_float()
        if reason is not None:
            raise ValueError(
                f"QMultiheadAttention.to_float: {reason}; qk.dequantize_(model) makes float layers "
                "of quantized ones"
            )
        layers: list[nn.Linear] = [getattr(self, name) for name in PROJECTIONS]
        *three, out = layers
        new = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            self.dropout,
            out.bias is not None,
            add_zero_attn=self.add_zero_attn,
            kdim=self.kdim,
            vdim=self.vdim,
            batch_first=self.batch_first,
            device="meta",
        )
        if new._parameters["in_proj_weight"] is None:
            for name, layer in zip(PROJECTIONS, three, strict=False):
                setattr(new, f"{name}_weight", layer.weight)
        else:
            new.in_proj_weight = _joined([layer.weight for layer in three])
        if out.bias is not None:
            new.in_proj_bias = _joined([layer.bias for layer in three])
            new.out_proj.bias = out.bias
        new.out_proj.weight = out.weight
        new.bias_k, new.bias_v = self.bias_k, self.bias_v
        carry_over(self, new)
        return new

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """What `nn.MultiheadAttention` computes, with the same arguments.

        Args:
            query: [batch, length, embed_dim] if `batch_first`, else [length, batch, embed_dim];
                or [length, embed_dim].
            key: the same with another length, and kdim features.
            value: the same with the key's length, and vdim features.
            key_padding_mask: [batch, key length], or [key length]; True where a key is left out,
                or floats to add to its scores.
            need_weights: whether attention weights are returned; without, it is faster.
            attn_mask: [length, key length] or [batch * num_heads, length, key length], as above.
            average_attn_weights: whether the weights are averaged over heads.
            is_causal: says that attn_mask, which must be given too, is the causal mask.

        Returns:
            The result, of the query's shape, and [batch, length, key length] weights, or [batch,
            num_heads, length, key length] ones, or None.

        Raises:
            ValueError: tensors or masks of other shapes.
            TypeError: nested tensors, or a mask of integers.
        """
        self._check(query, key, value)
        if is_causal and attn_mask is None:
            raise ValueError(
                "QMultiheadAttention: is_causal says that attn_mask is causal, but there is none; "
                "pass nn.Transformer.generate_square_subsequent_mask(length) too"
            )
        # The tensors as they are given, so that layers with one input can see that it is one.
        q = self._batch_first(self.q_proj(query))
        k = self._batch_first(self.k_proj(key))
        v = self._batch_first(self.v_proj(value))
        batch, given = k.shape[:2]
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat((k, self.bias_k.to(k.dtype).expand(batch, -1, -1)), 1)
            v = torch.cat((v, self.bias_v.to(v.dtype).expand(batch, -1, -1)), 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        more = k.shape[1] - given
        # With keys of the module's own, the mask is no longer what scaled_dot_product_attention
        # takes for causal.
        causal = is_causal and key_padding_mask is None and not need_weights and not more
        mask = None
        if not causal and attn_mask is not None:
            mask = self._attention_mask(attn_mask, q, given, more)
        if key_padding_mask is not None:
            padding = self._padding_mask(key_padding_mask, q, given, more)
            mask = padding if mask is None else mask + padding
        heads = (self.num_heads, self.head_dim)
        q, k, v = (x.unflatten(-1, heads).transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.mT
            weights = (scores if mask is None else scores + mask).softmax(-1)
            if dropout:
                weights = F.dropout(weights, dropout)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        if query.dim() == 2:
            joined = y.squeeze(0).transpose(0, 1)
            weights = None if weights is None else weights.squeeze(0)
        else:
            joined = y.transpose(1, 2) if self.batch_first else y.permute(2, 0, 1, 3)
        return self.out_proj(joined.flatten(-2)), weights

    def _batch_first(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if query.is_nested or key.is_nested or value.is_nested:
            raise TypeError(
                "QMultiheadAttention: query, key or value is a nested tensor; expected padded ones "
                "and a key_padding_mask"
            )
        batch = 0 if self.batch_first else 1
        if (
            query.dim() not in (2, 3)
            or query.dim() != key.dim()
            or key.shape[:-1] != value.shape[:-1]
            or (query.dim() == 3 and query.shape[batch] != key.shape[batch])
        ):
            raise ValueError(
                f"QMultiheadAttention: query, key and value have shapes {tuple(query.shape)}, "
                f"{tuple(key.shape)} and {tuple(value.shape)}; expected all with a batch or all "
                f"without, key and value of one length (batch_first is {self.batch_first})"
            )

    def _attention_mask(self, mask: Tensor, q: Tensor, keys: int, more: int) -> Tensor:
        batch, length = q.shape[:2]
        per_head = (batch * self.num_heads, length, keys)
        if tuple(mask.shape) not in ((length, keys), per_head):
            raise ValueError(
                f"QMultiheadAttention: attn_mask has shape {tuple(mask.shape)}; expected "
                f"({length}, {keys}) or {per_head}"
            )
        added = _added("attn_mask", mask, q.dtype, more)
        return added if mask.dim() == 2 else added.unflatten(0, (batch, self.num_heads))

    def _padding_mask(self, mask: Tensor, q: Tensor, keys: int, more: int) -> Tensor:
        batch = q.shape[0]
        if tuple(mask.shape) != (batch, keys) and (batch != 1 or tuple(mask.shape) != (keys,)):
            raise ValueError(
                f"QMultiheadAttention: key_padding_mask has shape {tuple(mask.shape)}; expected "
                f"({batch}, {keys}), or ({keys},) for tensors without a batch"
            )
        return _added("key_padding_mask", mask, q.dtype, more).view(batch, 1, 1, keys + more)

    def extra_repr(self) -> str:
        said = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"
        return f"{said}, batch_first={self.batch_first}"


def why_not_splittable(attention: nn.Module) -> str | None:
    """Why `QMultiheadAttention` cannot take the place of a module, or None.

    Args:
        attention: any module.
    """
    if type(attention) is not nn.MultiheadAttention:
        return "it is no nn.MultiheadAttention but a subclass or another class"
    usual = {
        *("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
        *("in_proj_bias", "bias_k", "bias_v"),
    }
    extra = {*attention._parameters, *attention._buffers, *attention._modules} - usual
    if extra != {"out_proj"}:
        return f"it holds more than its weights ({', '.join(sorted(extra - {'out_proj'}))})"
    if type(attention.out_proj) not in _WHOLE_OUT:
        return f"its out_proj is a {type(attention.out_proj).__name__}"
    reason = why_not_replaceable(attention.out_proj)
    if reason is not None:
        return f"out_proj: {reason}"
    held = (p for p in attention._parameters.values() if p is not None)
    if any(type(p) is not nn.Parameter for p in held):
        return "a weight is no plain parameter"
    return why_not_whole(attention)


def _view(whole: Tensor, rows: slice, made: dict[object, nn.Parameter]) -> nn.Parameter:
    view = nn.Parameter(whole.detach()[rows], whole.requires_grad)
    return made.setdefault((id(whole), rows.start), view)


def _joined(parts: list[Tensor]) -> nn.Parameter:
    joined = torch.cat([part.detach() for part in parts])
    return nn.Parameter(joined, any(part.requires_grad for part in parts))


def _added(name: str, mask: Tensor, dtype: torch.dtype, more: int) -> Tensor:
    """What is added to scores for a mask, with zeros for the keys that the module adds."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    elif not mask.is_floating_point():
        raise TypeError(
            f"QMultiheadAttention: {name} is {mask.dtype}; expected torch.bool or floating point"
        )
    return F.pad(mask.to(dtype), (0, more)) if more else mask.to(dtype)
