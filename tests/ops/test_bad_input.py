"""Every wrong argument gets a sentence: the op, the argument, what it expects, what it got."""

from typing import Any

import pytest
import torch

from helpers.conv import Geometry, conv_weight
from helpers.data import KINDS, floats, weight

from . import bad_int8, bad_transformer
from .samples import convolutions

ops = torch.ops.qkernels
INT8, INT4, NF4, INT16 = range(4)
HUGE = 2**63 - 1

X = floats((3, 8))
D8, S8, _ = ops.quantize(X, INT8)
D4, S4, Z4 = ops.quantize(X, INT4, 4, False)
W = weight(KINDS[0], 19, 8)  # int8, symmetric
G = weight(KINDS[4], 19, 8, 4)  # int4, asymmetric, bfloat16 scales
N4 = weight(KINDS[6], 19, 8)
BIAS, ONE = floats((19,)), torch.tensor(1.0)
BYTES = torch.zeros(32, dtype=torch.int8)
INDEX = torch.tensor([1, 2])
SYMMETRIC = KINDS[3].layout
CONV = Geometry((5, 6), (3, 2), (1, 1), (1, 0), (1, 0), (1, 1), 2, 4, 9)  # (2, 8, 5, 6) to 18
C8, C4 = conv_weight(CONV, KINDS[0]), conv_weight(CONV, KINDS[4], 4)
IMAGE = CONV.input()
CODES = torch.ones(2, 8, 5, 6, dtype=torch.int8)
RESULT = torch.ones(2, 18, 5, 5)


def linear(x: Any = X, packed: Any = None, w: Any = W, **change: Any) -> Any:
    names = "bias x_scale x_zero_point x_premul k_perm".split()
    sizes = {"layout": w.layout, "in_features": w.k, "out_features": w.n}
    sizes |= {"group_size": w.group_size, "activation": 0, "epilogue": 0}
    values = {**dict.fromkeys(names), **sizes, **change}
    return ops.linear(x, w.packed if packed is None else packed, *values.values())


def linear_shared(x: Any = X, **change: Any) -> Any:
    values = {"packed": [W.packed, W.packed], "bias": [BIAS, None], "layout": W.layout}
    values |= {"in_features": 8, "out_features": [19, 19], "group_size": -1}
    return ops.linear_shared(x, *{**values, "activation": 1, "epilogue": [0, 0], **change}.values())


def quantize(
    x: Any = X, format: int = INT8, group_size: Any = -1, symmetric: bool = True, **kw: Any
):
    return ops.quantize(x, format, group_size, symmetric, **kw)


def pack(data: Any = G.data, scale: Any = G.scale_tensor, zero: Any = G.zero_tensor, **change: Any):
    sizes = {"layout": G.layout, "in_features": 8, "group_size": 4}
    return ops.pack(data, scale, zero, *{**sizes, **change}.values())


def unpack(packed: Any = G.packed, **change: Any) -> Any:
    sizes = dict(zip("layout in_features out_features group_size".split(), G.sizes, strict=True))
    return ops.unpack(packed, *{**sizes, **change}.values())


def embedding(indices: Any = INDEX, packed: Any = W.packed, **change: Any) -> Any:
    sizes = {"layout": W.layout, "num_embeddings": 19, "embedding_dim": 8, "group_size": -1}
    return ops.embedding(indices, packed, *{**sizes, "dtype": torch.float32, **change}.values())


def gradient(grad: Any = BIAS, packed: Any = W.packed, **change: Any) -> Any:
    sizes = dict(zip("layout in_features out_features group_size".split(), W.sizes, strict=True))
    return ops.linear_backward_input(grad, packed, *{**sizes, **change}.values())


CONV_NAMES = (
    "x packed bias residual x_scale x_zero_point residual_scale residual_zero_point y_scale "
    "y_zero_point layout out_channels groups group_size kernel_size stride padding dilation "
    "transposed activation epilogue"
).split()


def conv(x: Any = IMAGE, w: Any = C8, **change: Any) -> Any:
    values = dict(zip(CONV_NAMES, w.arguments(x), strict=True))
    dtype = change.pop("dtype", None)
    assert change.keys() <= values.keys()
    return ops.conv(*{**values, **change}.values(), dtype)


def conv_sequence(**change: Any) -> Any:
    call = next(s for s in convolutions() if s.op is ops.conv_sequence.default).args
    names = "inputs constants layout wiring settings outputs".split()
    return ops.conv_sequence(*{**dict(zip(names, call, strict=True)), **change}.values())


def pack_conv(data: Any = None, scale: Any = None, zero: Any = None, w: Any = C8, **change: Any):
    stored = [a if b is None else b for a, b in zip(w.stored, (data, scale, zero), strict=True)]
    sizes = {"layout": w.kind.layout, "taps": 6, "group_channels": 4, "groups": 2}
    return ops.pack_conv(*stored, *{**sizes, "group_size": w.group_size, **change}.values())


def unpack_conv(packed: Any = C8.packed, **change: Any) -> Any:
    sizes = {"layout": C8.kind.layout, "taps": 6, "group_channels": 4, "groups": 2}
    sizes |= {"out_channels": 18, "group_size": -1, **change}
    return ops.unpack_conv(packed, *sizes.values())


def dequantize(data: Any = D8, scale: Any = S8, zero: Any = None, format: int = INT8,
               group_size: Any = -1, features: int = 8, dtype: Any = torch.float32):  # fmt: skip
    return ops.dequantize(data, scale, zero, format, group_size, features, dtype)


def quantize_out(data: Any = None, scale: Any = None, zero_point: Any = None, **kw: Any) -> Any:
    outs = {
        "data": torch.empty_like(D8) if data is None else data,
        "scale": torch.empty_like(S8) if scale is None else scale,
        "zero_point": torch.empty(0, dtype=torch.int8) if zero_point is None else zero_point,
    }
    return ops.quantize.out(X, INT8, **outs, **kw)


# What is called, op by op, and a piece of the sentence that it must give.
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
pack:
  pack(G.data.char())
    data must be uint8, got int8
  pack(G.data[0])
    data must have two dimensions (out_features, in_features as stored), got (4,)
  pack(G.data[:, :3])
    data must have shape (19, 4), got (19, 3)
  pack(scale=G.scale_tensor.float())
    scale must be bfloat16, got float32
  pack(scale=G.scale_tensor[:, :1])
    scale must have shape (19, 2), got (19, 1)
  pack(zero=None)
    the layout is asymmetric but zero_point is None; pass zero_point
  pack(zero=G.zero_tensor.char())
    zero_point must be uint8, got int8
  pack(zero=torch.full_like(G.zero_tensor, 121))
    zero_point must hold eighths of int4 codes, from 0 to 120, got 121
  pack(zero=G.zero_tensor[:18])
    zero_point must have shape (19, 2), got (18, 2)
  pack(layout=SYMMETRIC)
    zero_point is given but the layout is symmetric
  pack(group_size=0)
    group_size must be -1 (one group per row) or at least 1, got 0
  pack(in_features=-8)
    in_features and out_features must be from 0 to 2^40, got -8
  pack(in_features=HUGE)
    in_features and out_features must be from 0 to 2^40
  pack(scale=G.scale_tensor.to("meta"))
    scale is on meta but the first argument is on cpu
unpack:
  unpack(G.packed.char())
    packed must be uint8, got int8
  unpack(G.packed[:1])
    packed must have shape (2, 320) for a weight of (19, 8) in this layout, got (1, 320)
  unpack(G.packed[:, 1:])
    got (2, 319); pack it with torch.ops.qkernels.pack and the same layout
  unpack(G.packed.flatten())
    packed must have shape (2, 320)
  unpack(N4.packed)
    packed must have shape (2, 320)
  unpack(out_features=33)
    packed must have shape (3, 320)
  unpack(group_size=1)
    packed must have shape (2,
  unpack(out_features=-1)
    in_features and out_features must be from 0 to 2^40
int_mm:
  ops.int_mm(X, D8)
    a must be int8, got float32
  ops.int_mm(D8, X)
    b must be int8, got float32
  ops.int_mm(D8, D8)
    a and b must have shapes (M, K) and (K, N), got (3, 8) and (3, 8)
  ops.int_mm(D8, D8[0])
    a and b must have shapes (M, K) and (K, N), got (3, 8) and (8,)
  ops.int_mm(D8[None], D8)
    got (1, 3, 8) and (3, 8)
  ops.int_mm(D8, D8.t().to("meta"))
    b is on meta but the first argument is on cpu
linear:
  linear(X.double())
    x must be float32, bfloat16 or float16, got float64; convert it with .float()
  linear(D8)
    x must be float32, bfloat16 or float16, got int8
  linear(torch.tensor(1.0))
    x must have at least one dimension, got a scalar; pass x of shape (..., 8)
  linear(floats((3, 7)))
    x has 7 features but the weight has in_features=8; pass x of shape (..., 8)
  linear(packed=W.packed.char())
    packed must be uint8, got int8
  linear(packed=W.packed[1:])
    packed must have shape (2, 
  linear(packed=N4.packed)
    for a weight of (19, 8) in this layout, got (2, 128)
  linear(out_features=64)
    packed must have shape (4, 
  linear(in_features=-8, x=X)
    in_features and out_features must be from 0 to 2^40
  linear(x=torch.zeros(0, 2**41), in_features=2**41)
    in_features and out_features must be from 0 to 2^40
  linear(group_size=0)
    group_size must be -1 (one group per row) or at least 1, got 0
  linear(group_size=-5)
    group_size must be -1 (one group per row) or at least 1, got -5
  linear(w=G, group_size=1)
    packed must have shape (2,
  linear(activation=3)
    activation must be 0 (float), 1 (int8 symmetric) or 2 (int8 asymmetric), got 3
  linear(activation=-1)
    activation must be 0 (float)
  linear(w=N4, activation=1)
    an nf4 weight takes float activations, got activation=1; pass activation=0
  linear(epilogue=7)
    epilogue must be a code from 0 to 6 (none, relu, gelu, gelu_tanh, silu, relu6, hardswish), got 7
  linear(epilogue=-1)
    epilogue must be a code from 0 to 6
  linear(bias=BIAS.double())
    bias must be float32, bfloat16 or float16, got float64
  linear(bias=BIAS[:18])
    bias must have shape (19,), got (18,)
  linear(bias=BIAS[None])
    bias must have shape (19,), got (1, 19)
  linear(bias=BIAS.to("meta"))
    bias is on meta but the first argument is on cpu
  linear(packed=W.packed.to("meta"))
    packed is on meta but the first argument is on cpu
  linear(x_premul=floats((7,)))
    x_premul must have shape (8,), got (7,)
  linear(x_premul=floats((8,)).half())
    x_premul must be float32, got float16
  linear(k_perm=torch.arange(7))
    k_perm must have shape (8,), got (7,)
  linear(k_perm=torch.arange(8).int())
    k_perm must be int64, got int32
  linear(k_perm=torch.arange(8) + 1)
    k_perm must hold indices from 0 to 7, got 8 at 7
  linear(k_perm=torch.arange(8) - 1)
    k_perm must hold indices from 0 to 7, got -1 at 0
  linear(x_scale=ONE)
    x_scale is given but activation=0 keeps the activations float
  linear(x_scale=torch.ones(2), activation=1)
    x_scale must have one element (per tensor), got (2,)
  linear(x_scale=ONE.half(), activation=1)
    x_scale must be float32, got float16
  linear(x_zero_point=INDEX[:1].char(), activation=2)
    x_zero_point needs x_scale and activation=2
  linear(x_scale=ONE, x_zero_point=INDEX[:1].char(), activation=1)
    x_zero_point needs x_scale and activation=2
  linear(x_scale=ONE, x_zero_point=INDEX[:1], activation=2)
    x_zero_point must be int8, got int64
  linear(x_scale=ONE, x_zero_point=INDEX.char(), activation=2)
    x_zero_point must have one element (per tensor), got (2,)
  linear(x_scale=torch.tensor(0.0), activation=1)
    x_scale must be a positive, finite, normal number, got
  linear(x_scale=torch.tensor(-1.0), activation=1)
    x_scale must be a positive, finite, normal number, got
  linear(x_scale=torch.tensor(1e-39), activation=1)
    x_scale must be a positive, finite, normal number, got
  linear(x_scale=torch.tensor(torch.inf), activation=1)
    x_scale must be a positive, finite, normal number, got
  linear(x_scale=torch.tensor(torch.nan), activation=1)
    x_scale must be a positive, finite, normal number, got
linear_backward_input:
  gradient(BIAS.double())
    grad must be float32, bfloat16 or float16, got float64
  gradient(BIAS[:18])
    grad must have shape (..., 19), got (18,)
  gradient(torch.tensor(1.0))
    grad must have shape (..., 19), got ()
  gradient(packed=W.packed[:1])
    packed must have shape (2, 
  gradient(group_size=0)
    group_size must be -1
  gradient(packed=W.packed.to("meta"))
    packed is on meta but the first argument is on cpu
linear_shared:
  linear_shared(packed=[], bias=[], out_features=[], epilogue=[])
    must have one item for each weight, got 0, 0, 0 and 0
  linear_shared(bias=[BIAS])
    packed, bias, out_features and epilogue must have one item for each weight, got 2, 1, 2 and 2
  linear_shared(epilogue=[0, 0, 0])
    must have one item for each weight, got 2, 2, 2 and 3
  linear_shared(X.double())
    x must be float32, bfloat16 or float16, got float64; convert it with .float()
  linear_shared(floats((3, 7)))
    x has 7 features but the weight has in_features=8; pass x of shape (..., 8)
  linear_shared(packed=[W.packed, W.packed[1:]])
    packed must have shape (2, 
  linear_shared(bias=[None, floats((18,))])
    bias must have shape (19,), got (18,)
  linear_shared(epilogue=[0, 9])
    epilogue must be a code from 0 to 6
conv_sequence:
  conv_sequence(wiring=[0, -1, 1])
    wiring must have 2 entries and constants 8 for each step, got 3 and 24
  conv_sequence(constants=[None] * 24)
    constants must hold a packed weight for step 0
  conv_sequence(wiring=[0, -1, 2, -1, 2, 1])
    wiring must name inputs and earlier results, from 0 to 1 for step 1, got 2
  conv_sequence(wiring=[0, -1, -1, -1, 2, 1])
    wiring must name inputs and earlier results, from 0 to 1 for step 1, got -1
  conv_sequence(wiring=[0, -2, 1, -1, 2, 1])
    wiring must name inputs and earlier results, from 0 to 0 for step 0, got -2
  conv_sequence(settings=[])
    settings end before those of the last step
  conv_sequence(settings=[16, 1, -1, HUGE])
    settings hold a list of 9223372036854775807 numbers where 0 are left
  conv_sequence(outputs=[3, 1])
    outputs must be results, from 1 to 3, in order and each once, got (3, 1)
  conv_sequence(outputs=[0])
    outputs must be results, from 1 to 3
embedding:
  embedding(INDEX.float())
    indices must be int64 or int32, got float32; convert them with .long()
  embedding(INDEX.short())
    indices must be int64 or int32, got int16
  embedding(torch.tensor([3, 19]))
    index 19 is out of range for num_embeddings=19
  embedding(torch.tensor([-1]))
    index -1 is out of range for num_embeddings=19
  embedding(packed=W.packed[:1])
    packed must have shape (2, 
  embedding(dtype=torch.int8)
    dtype must be torch.float32, torch.bfloat16 or torch.float16, got torch.int8
  embedding(group_size=0)
    group_size must be -1
  embedding(packed=W.packed.to("meta"))
    packed is on meta but the first argument is on cpu
pack_conv:
  pack_conv(C8.stored[0].float())
    data must be int8, got float32
  pack_conv(C8.stored[0][0])
    data must have two dimensions
  pack_conv(C8.stored[0][:, 1:])
    data must have shape (18, 24), got (18, 23)
  pack_conv(scale=C8.stored[1][1:])
    scale must have shape (18, 1), got (17, 1)
  pack_conv(scale=C8.stored[1].double())
    scale must be float32, got float64
  pack_conv(zero=torch.ones(18, 1, dtype=torch.int8))
    zero_point is given but the layout is symmetric
  pack_conv(w=C4, zero=C4.stored[2][1:])
    zero_point must have shape (18, 6), got (17, 6)
  pack_conv(w=C4, zero=C4.stored[2] | 128)
    zero_point must hold eighths of int4 codes, from 0 to 120
  ops.pack_conv(*C4.stored[:2], None, C4.kind.layout, 6, 4, 2, 4)
    the layout is asymmetric but zero_point is None
  pack_conv(layout=-3)
    layout -3 is not a packed layout
  pack_conv(taps=0)
    the kernel must have from 1 to 1024 taps, got 0
  pack_conv(taps=HUGE)
    the kernel must have from 1 to 1024 taps
  pack_conv(groups=4)
    out_channels must be a multiple of groups, got 18 and 4
  pack_conv(groups=0)
    out_channels must be a multiple of groups
  pack_conv(group_channels=HUGE)
    the channels of a group must be from 0 to 2^40 / taps
  pack_conv(group_size=0)
    group_size must be -1
unpack_conv:
  unpack_conv(C8.packed[1:])
    packed must have shape (2, 
  unpack_conv(C8.packed.int())
    packed must be uint8, got int32
  unpack_conv(taps=4)
    packed must have shape (2, 
  unpack_conv(out_channels=17)
    out_channels must be a multiple of groups
  unpack_conv(group_channels=-1)
    the channels of a group must be from 0
conv:
  conv(IMAGE.double())
    x must be float32, bfloat16 or float16, got float64
  conv(IMAGE[0, 0, 0])
    x must have shape (batch, channels, 1 to 3 spatial dimensions), got (6,)
  conv(IMAGE[0])
    kernel_size must have 1 entries, one for each spatial dimension, got 2
  conv(IMAGE[:, 1:])
    x has 7 channels, which groups=2 does not divide
  conv(IMAGE[:, :6], groups=1)
    packed must have shape (2, 
  conv(packed=C8.packed[1:])
    packed must have shape (2, 
  conv(packed=C4.packed)
    packed must have shape (2, 
  conv(packed=C8.packed.to("meta"))
    packed is on meta but the first argument is on cpu
  conv(layout=-3)
    layout -3 is not a packed layout
  conv(out_channels=-1)
    out_channels must be a multiple of groups, got -1 and 2
  conv(groups=0)
    x has 8 channels, which groups=0 does not divide
  conv(group_size=-2)
    group_size must be -1
  conv(kernel_size=[3, 0])
    kernel_size must be from 1 to 1024, got 0
  conv(kernel_size=[HUGE, 2])
    kernel_size must be from 1 to 1024
  conv(stride=[0, 1])
    stride must be from 1 to 16777216, got 0
  conv(stride=[1])
    stride must have 2 entries
  conv(dilation=[1, -1])
    dilation must be from 1 to 16777216, got -1
  conv(padding=[1])
    padding must have 2 entries, or 4 where the second half is behind x, got 1
  conv(padding=[1, HUGE])
    padding must be from -16777216 to 16777216
  conv(IMAGE.new_empty(0, 8, 2**40, 6))
    has a spatial dimension that is longer than memory
  conv(padding=[-1, 0, -2, 0])
    the result would be empty: x (2, 8, 5, 6) with kernel_size (3, 2), padding (-1, 0, -2, 0)
  conv(padding=[1 << 24, 1 << 24])
    x with its padding would have
  conv(transposed=True, padding=[9, 9])
    the result would be empty
  conv(activation=3)
    activation must be 0 (float), 1 (int8 symmetric) or 2 (int8 asymmetric), got 3
  conv(w=C4, activation=1)
    int8 activations need an int8 weight, symmetric, with a scale for each output channel
  conv(epilogue=7)
    epilogue must be a code from 0 to 6
  conv(bias=ONE)
    bias must have shape (18,), got ()
  conv(bias=torch.ones(18, dtype=torch.int8))
    bias must be float32, bfloat16 or float16, got int8
  conv(CODES)
    x holds int8 codes, which need x_scale and activation=1 (symmetric) or 2 (asymmetric)
  conv(CODES, x_scale=ONE)
    x holds int8 codes, which need x_scale and activation=1
  conv(x_scale=ONE)
    x_scale is given but activation=0 keeps the activations float
  conv(activation=1, x_scale=torch.ones(2))
    x_scale must have one element (per tensor), got (2,)
  conv(activation=1, x_scale=ONE * torch.nan)
    x_scale must be a positive, finite, normal number, got nan; calibrate again
  conv(activation=1, x_scale=ONE, x_zero_point=ONE.char())
    x_zero_point needs x_scale and activation=2 (asymmetric)
  conv(activation=2, x_scale=ONE, x_zero_point=ONE)
    x_zero_point must be int8, got float32
  conv(y_scale=ONE)
    y_scale needs int8 activations
  conv(activation=1, y_scale=-ONE)
    y_scale must be a positive, finite, normal number, got -1
  conv(activation=1, y_zero_point=ONE.char())
    y_zero_point needs y_scale
  conv(activation=1, y_scale=ONE, dtype=torch.float32)
    y_scale gives int8 codes but dtype is float32; leave dtype out
  conv(activation=1, dtype=torch.int8)
    dtype must be torch.float32, torch.bfloat16 or torch.float16, got torch.int8
  conv(dtype=torch.bfloat16)
    dtype must be that of x when the activations stay float
  conv(residual=RESULT)
    residual needs int8 activations; add it to the result instead
  conv(activation=1, residual=RESULT[1:])
    residual must have shape (2, 18, 5, 5), got (1, 18, 5, 5)
  conv(activation=1, residual=RESULT.char())
    residual_scale goes with a residual of int8 codes, and only with that
  conv(activation=1, residual=RESULT, residual_scale=ONE)
    residual_scale goes with a residual of int8 codes, and only with that
  conv(activation=1, residual=RESULT.int())
    residual must be float32, bfloat16 or float16, got int32
  conv(activation=1, residual_scale=ONE)
    residual_scale and residual_zero_point need residual
"""


def cases() -> list[Any]:
    found, op = [], ""
    tables = (TABLE, bad_int8.TABLE, bad_transformer.TABLE)
    lines = iter([line for table in tables for line in table.strip().splitlines()])
    for line in lines:
        if line.endswith(":") and not line.startswith(" "):
            op = line.removesuffix(":")
        else:
            found.append(pytest.param(op, line.strip(), next(lines).strip(), id=line.strip()))
    return found


@pytest.mark.parametrize(("op", "call", "sentence"), cases())
def test_sentence(op: str, call: str, sentence: str) -> None:
    others = (vars(module) for module in (bad_int8, bad_transformer))
    names = next((names for names in others if op in names), globals())
    with pytest.raises(RuntimeError) as caught:
        eval(call, names)
    message = str(caught.value).splitlines()[0]
    assert message.startswith(f"qkernels::{op}: ")
    assert sentence in message
    assert ".cpp:" not in message


def test_every_op_has_bad_calls() -> None:
    names = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("qkernels::")}
    tested = {case.values[0] for case in cases()}
    # The same functions in C++ as linear and conv, so they speak as those do.
    known = tested | {"linear_differentiable", "conv_differentiable"}
    assert {name.removeprefix("qkernels::") for name in names} == known


def test_nothing_is_written_when_a_check_fails() -> None:
    data = torch.full((3, 8), 5, dtype=torch.int8)
    with pytest.raises(RuntimeError, match="scale must have shape"):
        quantize_out(data=data, scale=torch.empty(4, 1))
    assert (data == 5).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_too_little_memory(threads: int) -> None:
    """For copies, results and what is computed with, also on other threads."""
    keys = floats((1, 1, 4)).expand(1, 2**37, 4)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for call in (
            lambda: ops.quantize(X.expand(2**40, 3, 8), INT8),
            lambda: ops.lookup(torch.ones(1, dtype=torch.int8).expand(2**45), BYTES.repeat(8)),
            lambda: ops.attention(floats((1, 300, 4)), keys, keys, None, 1, 1.0, False),
        ):
            with pytest.raises(RuntimeError, match="^qkernels: .*could not allocate"):
                call()
    finally:
        torch.set_num_threads(before)


def test_rows_without_elements_take_no_time() -> None:
    many = torch.empty(2**40, 0)
    data, scale, _ = ops.quantize(many, INT8, None)
    ops.quantize_with(many, scale, None, INT8, None)
    ops.dequantize(data, scale, None, INT8, None, 0, torch.float32)
    ops.fake_quantize(many, INT8)
    ops.fake_quantize_with(many, scale, None, INT8, None)
    codes, scales = data.view(torch.uint8), many.to(KINDS[6].scale_dtype)
    layout = KINDS[6].layout
    packed = ops.pack(codes, scales, None, layout, 0, 4)
    ops.unpack(packed, layout, 0, 2**40, 4)
    packed = ops.pack_conv(codes, scales, None, layout, 1, 0, 2**40, 4)
    ops.unpack_conv(packed, layout, 1, 0, 2**40, 2**40, 4)


def test_layouts_of_other_kinds_of_tensors() -> None:
    """Sparse, quantized or nested tensors have no kernel; torch says so."""
    for x in (X.to_sparse(), X.to_mkldnn()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            linear(x)
