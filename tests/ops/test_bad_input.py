"""Every wrong argument gets a sentence: the op, the argument, what it expects, what it got."""

from typing import Any

import pytest
import torch

from helpers.data import KINDS, floats, weight

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
INDEX = torch.tensor([1, 2])
SYMMETRIC = KINDS[3].layout


def linear(x: Any = X, packed: Any = None, w: Any = W, **change: Any) -> Any:
    names = "bias x_scale x_zero_point x_premul k_perm".split()
    sizes = {"layout": w.layout, "in_features": w.k, "out_features": w.n}
    sizes |= {"group_size": w.group_size, "activation": 0, "epilogue": 0}
    values = {**dict.fromkeys(names), **sizes, **change}
    return ops.linear(x, w.packed if packed is None else packed, *values.values())


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
  ops.quantize_with(X, S4, torch.full_like(Z4, 16), INT4, 4)
    zero_point must hold int4 codes from 0 to 15, got 16
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
  ops.fake_quantize_with(X, S4, torch.full_like(Z4, 16), INT4, 4)
    zero_point must hold int4 codes from 0 to 15, got 16
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
    features must not be negative, got -1
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
    zero_point must hold int4 codes from 0 to 15, got 255
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
  pack(zero=torch.full_like(G.zero_tensor, 16))
    zero_point must hold int4 codes from 0 to 15, got 16
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
  linear(epilogue=5)
    epilogue must be a code from 0 to 4 (none, relu, gelu, gelu_tanh, silu), got 5
  linear(epilogue=-1)
    epilogue must be a code from 0 to 4
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


def cases() -> list[Any]:
    found, op = [], ""
    lines = iter(TABLE.strip().splitlines())
    for line in lines:
        if line.endswith(":") and not line.startswith(" "):
            op = line.removesuffix(":")
        else:
            found.append(pytest.param(op, line.strip(), next(lines).strip(), id=line.strip()))
    return found


@pytest.mark.parametrize(("op", "call", "sentence"), cases())
def test_sentence(op: str, call: str, sentence: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        eval(call)
    message = str(caught.value).splitlines()[0]
    assert message.startswith(f"qkernels::{op}: ")
    assert sentence in message
    assert ".cpp:" not in message


def test_every_op_has_bad_calls() -> None:
    names = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("qkernels::")}
    tested = {case.values[0] for case in cases()}
    # The same function in C++ as linear, so it speaks as linear does.
    assert {name.removeprefix("qkernels::") for name in names} - {"linear_differentiable"} == tested


def test_nothing_is_written_when_a_check_fails() -> None:
    data = torch.full((3, 8), 5, dtype=torch.int8)
    with pytest.raises(RuntimeError, match="scale must have shape"):
        quantize_out(data=data, scale=torch.empty(4, 1))
    assert (data == 5).all()


def test_layouts_of_other_kinds_of_tensors() -> None:
    """Sparse, quantized or nested tensors have no kernel; torch says so."""
    for x in (X.to_sparse(), X.to_mkldnn()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            linear(x)
