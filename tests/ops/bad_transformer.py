"""Wrong calls of the ops between a transformer's layers, for test_bad_input.py."""

from typing import Any

import torch

from helpers.data import floats

from .samples import encoder_layer

ops = torch.ops.qkernels

Q, KV = floats((2, 3, 24)), floats((2, 5, 12))  # 4 heads of 6, and 2 of them
X, WEIGHT = floats((2, 3, 8)), floats((8,))


def attention(q: Any = Q, k: Any = KV, v: Any = KV, **change: Any) -> Any:
    rest = {"mask": None, "heads": 4, "scale": 0.5, "causal": False}
    assert change.keys() <= rest.keys()
    return ops.attention(q, k, v, *{**rest, **change}.values())


def add_norm(x: Any = X, **change: Any) -> Any:
    rest = {"residual": None, "weight": WEIGHT, "bias": WEIGHT, "eps": 1e-5, "rms": False}
    assert change.keys() <= rest.keys()
    return ops.add_norm(x, *{**rest, **change}.values(), False)


def op_sequence(**change: Any) -> Any:
    names = "inputs program factors outputs".split()
    call = dict(zip(names, encoder_layer(torch.float32), strict=True))
    assert change.keys() <= call.keys()
    return ops.op_sequence(*{**call, **change}.values())


PROGRAM = encoder_layer(torch.float32)[1]
NORM = PROGRAM[-7:]  # of the values 8 and 0


TABLE = """
op_sequence:
  op_sequence(program=[4])
    program must name ops from 0 to 3, got 4
  op_sequence(program=[-1])
    program must name ops from 0 to 3, got -1
  op_sequence(program=PROGRAM[:-1])
    program ends before its last step does
  op_sequence(program=[1, 2**63 - 1])
    program ends before its last step does
  op_sequence(program=NORM)
    value 8 is named but there are 4 so far, or it was read for the last time before
  op_sequence(program=[3, -3, *NORM[2:]])
    value -1 is named but there are 4 so far
  op_sequence(program=[3, -1, *NORM[2:]])
    program names no tensor (-1) where a step needs one
  op_sequence(program=[3, 1, 0, *NORM[3:]])
    value 0 is named but there are 4 so far, or it was read for the last time before
  op_sequence(factors=[0.4])
    factors end before those of the last step
  op_sequence(factors=[0.4, 1e-5, 1.0])
    factors hold 1 numbers that no step reads
  op_sequence(outputs=[9, 5])
    outputs must be results, from 4 on, in order and each once, got (9, 5)
  op_sequence(outputs=[5, 5])
    outputs must be results, from 4 on, in order and each once, got (5, 5)
  op_sequence(outputs=[3])
    outputs must be results, from 4 on
  op_sequence(outputs=[4])
    value 4 is named but there are 11 so far, or it was read for the last time before
  op_sequence(outputs=[11])
    value 11 is named but there are 11 so far
attention:
  attention(Q.double())
    q must be float32, bfloat16 or float16, got float64; convert it with .float()
  attention(k=KV.half())
    k must have the dtype of q (float32), got float16; convert it with .to(q.dtype)
  attention(v=KV.int())
    v must have the dtype of q (float32), got int32
  attention(k=KV[:1, :1].expand(2, 2**58, 12), v=KV[:1, :1].expand(2, 2**58, 12))
    k must have at most 2^40 rows, got (2, 288230376151711744, 12)
  attention(Q[0])
    q must have shape (batch, rows, heads * features), got (3, 24)
  attention(k=KV[None])
    k must have shape (batch, rows, heads * features), got (1, 2, 5, 12)
  attention(v=torch.tensor(1.0))
    v must have shape (batch, rows, heads * features), got ()
  attention(heads=5)
    heads must divide the 24 features of q, got 5
  attention(heads=0)
    heads must divide the 24 features of q, got 0
  attention(heads=-4)
    heads must divide the 24 features of q, got -4
  attention(Q[..., :0])
    heads must divide the 0 features of q, got 4
  attention(k=KV[..., :11])
    k must have 6 features for each of its heads, whose number divides 4, got (2, 5, 11)
  attention(k=floats((2, 5, 18)))
    k must have 6 features for each of its heads, whose number divides 4, got (2, 5, 18)
  attention(k=KV[..., :0])
    k must have 6 features for each of its heads, whose number divides 4, got (2, 5, 0)
  attention(v=KV[..., :11])
    v must have the 2 heads of k, with as many features each, got (2, 5, 11)
  attention(v=KV[..., :0])
    v must have the 2 heads of k, with as many features each, got (2, 5, 0)
  attention(v=KV[:, 1:])
    got q (2, 3, 24), k (2, 5, 12) and v (2, 4, 12)
  attention(k=KV[1:], v=KV[1:])
    k and v must have q's batch size and the same rows, got q (2, 3, 24), k (1, 5, 12)
  attention(mask=torch.ones(3, 5).double())
    mask must be bool (True: attend) or float32, bfloat16 or float16 (added), got float64
  attention(mask=torch.ones(3, 5).int())
    mask must be bool (True: attend) or float32, bfloat16 or float16 (added), got int32
  attention(mask=torch.ones(3, 4))
    mask must broadcast to (batch, heads, rows of q, rows of k) = (2, 4, 3, 5), got (3, 4)
  attention(mask=torch.ones(1, 2, 4, 3, 5))
    mask must broadcast to (batch, heads, rows of q, rows of k) = (2, 4, 3, 5), got (1, 2, 4, 3, 5)
  attention(k=KV.to("meta"))
    k is on meta but the first argument is on cpu
add_norm:
  add_norm(X.double())
    x must be float32, bfloat16 or float16, got float64; convert it with .float()
  add_norm(torch.tensor(1.0))
    x must have at least one dimension, got a scalar; pass x of shape (..., features)
  add_norm(residual=X[:1])
    residual must have shape (2, 3, 8), got (1, 3, 8)
  add_norm(residual=X.half())
    residual must be float32, got float16
  add_norm(weight=WEIGHT[1:])
    weight must have shape (8,), got (7,)
  add_norm(weight=WEIGHT.half())
    weight must be float32 or have the dtype of x (float32), got float16; convert it with .float()
  add_norm(bias=X)
    bias must have shape (8,), got (2, 3, 8)
  add_norm(X.half(), bias=WEIGHT.half())
    bias must have the dtype of weight (float32), got float16; convert one of them
  add_norm(eps=-1e-5)
    eps must be 0 or more, got -1e-05
  add_norm(eps=float("nan"))
    eps must be 0 or more, got nan
  add_norm(bias=WEIGHT.to("meta"))
    bias is on meta but the first argument is on cpu
"""
