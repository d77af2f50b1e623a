"""Wrong calls of linear, and of the ops that pack or read its weights, for test_bad_input.py."""

from typing import Any

import torch

from helpers.data import KINDS, floats, weight

ops = torch.ops.qkernels

HUGE = 2**63 - 1

X = floats((3, 8))
D8 = torch.ones(3, 8, dtype=torch.int8)
W = weight(KINDS[0], 19, 8)  # int8, symmetric
G = weight(KINDS[4], 19, 8, 4)  # int4, asymmetric, bfloat16 scales
N4 = weight(KINDS[6], 19, 8)
BIAS, ONE = floats((19,)), torch.tensor(1.0)
INDEX = torch.tensor([1, 2])
SYMMETRIC = KINDS[3].layout


def pack(data: Any = G.data, scale: Any = G.scale_tensor, zero: Any = G.zero_tensor, **change: Any):
    sizes = {"layout": G.layout, "in_features": 8, "group_size": 4}
    return ops.pack(data, scale, zero, *{**sizes, **change}.values())


def unpack(packed: Any = G.packed, **change: Any) -> Any:
    sizes = dict(zip("layout in_features out_features group_size".split(), G.sizes, strict=True))
    return ops.unpack(packed, *{**sizes, **change}.values())


def linear(x: Any = X, packed: Any = None, w: Any = W, **change: Any) -> Any:
    names = "bias x_scale x_zero_point x_premul k_perm".split()
    sizes = {"layout": w.layout, "in_features": w.k, "out_features": w.n}
    sizes |= {"group_size": w.group_size, "activation": 0, "epilogue": 0}
    values = {**dict.fromkeys(names), **sizes, **change}
    return ops.linear(x, w.packed if packed is None else packed, *values.values())


def gradient(grad: Any = BIAS, packed: Any = W.packed, **change: Any) -> Any:
    sizes = dict(zip("layout in_features out_features group_size".split(), W.sizes, strict=True))
    return ops.linear_backward_input(grad, packed, *{**sizes, **change}.values())


def linear_shared(x: Any = X, **change: Any) -> Any:
    values = {"packed": [W.packed, W.packed], "bias": [BIAS, None], "layout": W.layout}
    values |= {"in_features": 8, "out_features": [19, 19], "group_size": -1}
    return ops.linear_shared(x, *{**values, "activation": 1, "epilogue": [0, 0], **change}.values())


def embedding(indices: Any = INDEX, packed: Any = W.packed, **change: Any) -> Any:
    sizes = {"layout": W.layout, "num_embeddings": 19, "embedding_dim": 8, "group_size": -1}
    return ops.embedding(indices, packed, *{**sizes, "dtype": torch.float32, **change}.values())


TABLE = """
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
"""
