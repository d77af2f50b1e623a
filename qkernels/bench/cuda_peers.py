"""What others offer for a linear layer on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Call:
    """A contender in one case.

    Args:
        name: of the contender.
        prepare: makes the tensors that it reads of the weight, which are copied to rotate them.
        run: computes the layer with them.
        nbytes: of the weight as it reads it.
    """

    name: str
    prepare: Callable[[], tuple[Tensor, ...]]
    run: Callable[..., object]
    nbytes: float


def linear_peers(x: Tensor, weight: Tensor) -> Iterator[Call]:
    """The peers for x times a weight.

    Args:
        x: bfloat16 [rows, in_features].
        weight: bfloat16 [out_features, in_features].
    """
    size = float(weight.nbytes)
    yield Call("matmul bf16", lambda: (weight,), lambda w: torch.matmul(x, w.t()), size)
    half = x.half()
    yield Call("matmul fp16", lambda: (weight.half(),), lambda w: torch.matmul(half, w.t()), size)
    if x.shape[0] > 16:  # what the op takes
        codes = (x.float() * 20).clamp(-127, 127).to(torch.int8)
        yield Call(
            "torch._int_mm",
            lambda: ((weight.float() * 1000).clamp(-127, 127).to(torch.int8),),
            lambda w: torch._int_mm(codes, w.t()),
            size / 2,
        )
    if x.is_cuda:
        yield _int4pack(x, weight)
        yield _bitsandbytes(x, weight)
        yield _torchao(x, weight)
        if x.shape[0] in (1, 64):  # each shape is compiled, which takes many seconds
            yield _compiled(x, weight)


def _int4pack(x: Tensor, weight: Tensor) -> Call:
    group = 128
    n, k = weight.shape

    def prepare() -> tuple[Tensor, ...]:
        # Speed does not depend on the codes: all eights, and scales of one.
        pairs = torch.full((n, k // 2), 0x88, dtype=torch.uint8, device=x.device)
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
        scales = torch.ones(k // group, n, 2, dtype=x.dtype, device=x.device)
        return packed, scales

    def run(packed: Tensor, scales: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm(x, packed, group, scales)
        return y

    return Call("aten::_weight_int4pack_mm g128", prepare, run, n * k / 2 + n * k / group * 4)


def _compiled(x: Tensor, weight: Tensor) -> Call:
    n, k = weight.shape

    def prepare() -> tuple[Tensor, ...]:
        scale = weight.float().abs().amax(1, keepdim=True).div(127).to(x.dtype)
        return (weight / scale).round().to(torch.int8), scale

    @torch.compile
    def product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        return torch.matmul(x, (codes.to(x.dtype) * scale).t())

    return Call("compiled dequantize + matmul int8", prepare, lambda *w: product(x, *w), n * k)


def _bitsandbytes(x: Tensor, weight: Tensor) -> Call:
    n, k = weight.shape

    def prepare() -> tuple[Tensor, ...]:
        import bitsandbytes.functional as bnb

        packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        states["state"] = state
        return (packed,)

    def run(packed: Tensor) -> object:
        import bitsandbytes as bnb

        return bnb.matmul_4bit(x, packed.t(), quant_state=states["state"])

    states: dict[str, Any] = {}
    return Call("bitsandbytes NF4", prepare, run, n * k / 2 + n * k / 64 * 4)


def _torchao(x: Tensor, weight: Tensor) -> Call:
    n, k = weight.shape
    layers: dict[str, Any] = {}

    def prepare() -> tuple[Tensor, ...]:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        layer = torch.nn.Sequential(torch.nn.Linear(k, n, bias=False, device=x.device))
        layer.to(x.dtype)
        quantize_(layer, Int8WeightOnlyConfig())
        layers["layer"] = layer
        return ()

    return Call("torchao int8 weight only", prepare, lambda: layers["layer"](x), n * k)
