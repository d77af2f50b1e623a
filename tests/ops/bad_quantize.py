"""Wrong calls of the ops that quantize and dequantize tensors, for test_bad_input.py."""

from typing import Any

import torch

from helpers.data import floats

ops = torch.ops.qkernels

INT8, INT4, NF4, INT16 = range(4)
HUGE = 2**63 - 1

X = floats((3, 8))
D8, S8, _ = ops.quantize(X, INT8)
D4, S4, Z4 = ops.quantize(X, INT4, 4, False)
ONE, BYTES = torch.tensor(1.0), torch.zeros(32, dtype=torch.int8)


def quantize(
    x: Any = X, format: int = INT8, group_size: Any = -1, symmetric: bool = True, **kw: Any
):
    return ops.quantize(x, format, group_size, symmetric, **kw)


def quantize_out(data: Any = None, scale: Any = None, zero_point: Any = None, **kw: Any) -> Any:
    outs = {
        "data": torch.empty_like(D8) if data is None else data,
        "scale": torch.empty_like(S8) if scale is None else scale,
        "zero_point": torch.empty(0, dtype=torch.int8) if zero_point is None else zero_point,
    }
    return ops.quantize.out(X, INT8, **outs, **kw)


def dequantize(data: Any = D8, scale: Any = S8, zero: Any = None, format: int = INT8,
               group_size: Any = -1, features: int = 8, dtype: Any = torch.float32):  # fmt: skip
    return ops.dequantize(data, scale, zero, format, group_size, features, dtype)


TABLE = """
quantize:
  quantize(X.double())
    x must be float32, bfloat16 or float16, got float64; convert
  quantize(D8)
    x must be float32, bfloat16 or float16, got int8
  quantize(X.to(torch.complex64))
    x must be float32, bfloat16 or float16, got
  quantize(torch.tensor(1.0))
    x must have at least one dimension, got a scalar; pass x.reshape(1)
  quantize(format=4)
    format must be a code from 0 to 3, got 4
  quantize(format=-1)
    format must be a code from 0 to 3, got -1
  quantize(format=HUGE)
    format must be a code from 0 to 3, got 9223372036854775807
  quantize(group_size=0)
    group_size must be -1 (one group per row) or at least 1, got 0
  quantize(group_size=-2)
    group_size must be -1 (one group per row) or at least 1, got -2
  quantize(format=NF4, symmetric=False)
    format nf4 has no zero point; pass symmetric=True
  quantize(scale_dtype=torch.float64)
    scale_dtype must be torch.float32, torch.bfloat16 or torch.float16, got torch.float64
  quantize(scale_dtype=torch.int8)
    scale_dtype must be
  quantize_out(data=torch.empty(3, 7, dtype=torch.int8))
    data must have shape (3, 8), got (3, 7)
  quantize_out(data=torch.empty(3, 8))
    data must be int8, got float32
  quantize_out(data=torch.empty(8, 3, dtype=torch.int8).t())
    data must be contiguous
  quantize_out(scale=torch.empty(3))
    scale must have shape (3, 1), got (3,)
  quantize_out(scale=torch.empty(3, 1).double())
    scale must be float32, bfloat16 or float16
  quantize_out(zero_point=torch.empty(3, 1, dtype=torch.int8))
    zero_point must have shape (0,), got (3, 1)
  quantize_out(data=BYTES[:24].view(3, 8), scale=BYTES[20:].view(torch.float32).view(3, 1))
    data shares memory with another tensor of the call
  quantize_out(symmetric=False)
    zero_point must have shape (3, 1), got (0,)
  quantize_out(data=D8.to("meta"))
    data is on meta but the first argument is on cpu
quantize_with:
  ops.quantize_with(X.int(), S8, None, INT8)
    x must be float32, bfloat16 or float16, got int32
  ops.quantize_with(X, S8[:2], None, INT8)
    scale must have shape (3, 1) for this group_size, got (2, 1)
  ops.quantize_with(X, S8, None, INT8, None)
    scale must have one element for this group_size, got (3, 1)
  ops.quantize_with(X, S8, None, INT8, 4)
    scale must have shape (3, 2) for this group_size, got (3, 1)
  ops.quantize_with(X, S8.double(), None, INT8)
    scale must be float32, bfloat16 or float16, got float64
  ops.quantize_with(X, S8, Z4, INT8)
    zero_point must be int8, got uint8
  ops.quantize_with(X, S8, Z4, INT4)
    zero_point must have the shape of scale, (3, 1), got (3, 2)
  ops.quantize_with(X, S8, Z4[:, :1], NF4)
    format nf4 has no zero point; pass zero_point=None
  ops.quantize_with(X, S4, torch.full_like(Z4, 121), INT4, 4)
    zero_point must hold eighths of int4 codes, from 0 to 120, got 121
  ops.quantize_with(X, S8, None, 9)
    format must be a code from 0 to 3, got 9
  ops.quantize_with(X, S8, None, INT8, 0)
    group_size must be -1
  ops.quantize_with(X, S8.to("meta"), None, INT8)
    scale is on meta but the first argument is on cpu
  ops.quantize_with.out(X, S8, None, INT8, out=D4)
    out must be int8, got uint8
  ops.quantize_with.out(X, S8, None, INT8, out=D8[:2])
    out must have shape (3, 8), got (2, 8)
  ops.quantize_with.out(X, S8, None, INT8, out=D8.t().contiguous().t())
    out must be contiguous
  ops.quantize_with.out(BYTES.view(torch.float32)[None], ONE, None, INT8, None, out=BYTES[None, :8])
    out shares memory with another tensor of the call
fake_quantize:
  ops.fake_quantize(X.double(), INT8)
    x must be float32, bfloat16 or float16, got float64; convert
  ops.fake_quantize(torch.tensor(1.0), INT8)
    x must have at least one dimension, got a scalar
  ops.fake_quantize(X, 4)
    format must be a code from 0 to 3, got 4
  ops.fake_quantize(X, INT8, 0)
    group_size must be -1
  ops.fake_quantize(X, NF4, -1, False)
    format nf4 has no zero point; pass symmetric=True
  ops.fake_quantize(X, INT8, scale_dtype=torch.int8)
    scale_dtype must be torch.float32
fake_quantize_with:
  ops.fake_quantize_with(X.int(), S8, None, INT8)
    x must be float32, bfloat16 or float16, got int32
  ops.fake_quantize_with(X, S8[:2], None, INT8)
    scale must have shape (3, 1) for this group_size, got (2, 1)
  ops.fake_quantize_with(X, S8.double(), None, INT8)
    scale must be float32, bfloat16 or float16, got float64
  ops.fake_quantize_with(X, S8, Z4, INT8)
    zero_point must be int8, got uint8
  ops.fake_quantize_with(X, S8, Z4.float(), INT8)
    zero_point must have the shape of scale, (3, 1), got (3, 2)
  ops.fake_quantize_with(X, S8, S8, NF4)
    format nf4 has no zero point; pass zero_point=None
  ops.fake_quantize_with(X, S8, S8 * torch.nan, INT8)
    zero_point holds NaN; training has diverged
  ops.fake_quantize_with(X, S4, torch.full_like(Z4, 121), INT4, 4)
    zero_point must hold eighths of int4 codes, from 0 to 120, got 121
  ops.fake_quantize_with(X, S8.to("meta"), None, INT8)
    scale is on meta but the first argument is on cpu
fake_quantize_backward:
  ops.fake_quantize_backward(X[:2], X, S8, None, INT8)
    grad must have shape (3, 8), got (2, 8)
  ops.fake_quantize_backward(X.bfloat16(), X, S8, None, INT8)
    grad must be float32, got bfloat16
  ops.fake_quantize_backward(X, X, S8, None, 9)
    format must be a code from 0 to 3, got 9
dequantize:
  dequantize(D8.int())
    data must be int8, got int32
  dequantize(D8, format=INT4)
    data must be uint8, got int8
  dequantize(D8, format=INT16)
    data must be int16, got int8
  dequantize(features=9)
    data must have shape (3, 9), got (3, 8)
  dequantize(D4, S4, Z4, INT4, 4, 10)
    data must have shape (3, 5), got (3, 4)
  dequantize(features=-1)
    features must be from 0 to 2^40, got -1
  dequantize(D4[:, :0], S4[:, :1], None, INT4, -1, 2**62)
    features must be from 0 to 2^40, got 4611686018427387904
  dequantize(D4, S4, Z4.reshape(2, 3), INT4, 4)
    zero_point must have the shape of scale, (3, 2), got (2, 3)
  dequantize(torch.tensor(1, dtype=torch.int8))
    data must have at least one dimension, got a scalar
  dequantize(scale=S8.double())
    scale must be float32, bfloat16 or float16, got float64
  dequantize(scale=S8.t())
    scale must have shape (3, 1) for this group_size, got (1, 3)
  dequantize(D4, S4, Z4.char(), INT4, 4)
    zero_point must be uint8, got int8
  dequantize(D4, S4, Z4[:2], INT4, 4)
    zero_point must have the shape of scale, (3, 2), got (2, 2)
  dequantize(D4, S4, torch.full_like(Z4, 255), INT4, 4)
    zero_point must hold eighths of int4 codes, from 0 to 120, got 255
  dequantize(group_size=-3)
    group_size must be -1
  dequantize(format=7)
    format must be a code from 0 to 3, got 7
  dequantize(dtype=torch.float64)
    dtype must be torch.float32, torch.bfloat16 or torch.float16, got torch.float64
  dequantize(scale=S8.to("meta"))
    scale is on meta but the first argument is on cpu
  ops.dequantize.out(D8, S8, None, INT8, -1, out=torch.empty(3, 8).double())
    out must be float32, bfloat16 or float16, got float64
  ops.dequantize.out(D8, S8, None, INT8, -1, out=torch.empty(8, 3).t())
    out must be contiguous
  ops.dequantize.out(D8, S8, None, INT8, -1, out=torch.empty(3, 9))
    data must have shape (3, 9), got (3, 8)
  ops.dequantize.out(D8, S8, None, INT8, -1, out=torch.tensor(1.0))
    out must have at least one dimension, got a scalar
  ops.dequantize.out(BYTES[None, :8], ONE, None, INT8, None, out=BYTES.view(torch.float32)[None])
    out shares memory with another tensor of the call; pass a tensor of its own
  ops.dequantize.out(D8, S8, None, INT8, -1, out=torch.empty(3, 8, requires_grad=True))
    out requires grad, which nothing could give it
"""
