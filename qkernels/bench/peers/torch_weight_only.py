"""torch's own weight-only products: `_weight_int8pack_mm` and `_weight_int4pack_mm_for_cpu`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qkernels.bench.engines import Call, LinearEngine

_GROUP = 128


def _int8(weight: Tensor, copies: int) -> Sequence[Call]:
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale[:, None]).round().to(torch.int8)
    scale = scale.to(torch.bfloat16)

    def one(copy: Tensor) -> Call:
        return lambda x: torch._weight_int8pack_mm(x, copy, scale)

    return [one(codes.clone()) for _ in range(copies)]


def _int4(weight: Tensor, copies: int) -> Sequence[Call]:
    n, k = weight.shape
    groups = weight.view(n, k // _GROUP, _GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = (high - low) / 15
    codes = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes.view(n, k), 1)
    # The kernel computes (code - 8) * scale + zero.
    zero = low + 8 * scale
    parameters = torch.stack([scale, zero], -1).transpose(0, 1).to(torch.bfloat16).contiguous()

    def one(copy: Tensor) -> Call:
        return lambda x: torch._weight_int4pack_mm_for_cpu(x, copy, _GROUP, parameters)

    return [one(packed.clone()) for _ in range(copies)]


def linear_engines() -> list[LinearEngine]:
    bits = 4 + 32 / _GROUP
    return [
        LinearEngine("torch int8pack bf16", "8 bits", torch.bfloat16, 8, "bf16", _int8),
        LinearEngine(
            f"torch int4pack g{_GROUP} bf16", "4 bits", torch.bfloat16, bits, "bf16", _int4
        ),
    ]
