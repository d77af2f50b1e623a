"""Wrong calls of the ops of convolutions, for test_bad_input.py."""

from typing import Any

import torch

from helpers.conv import Geometry, conv_weight
from helpers.data import KINDS

from .samples import convolutions

ops = torch.ops.qkernels

HUGE = 2**63 - 1

CONV = Geometry((5, 6), (3, 2), (1, 1), (1, 0), (1, 0), (1, 1), 2, 4, 9)  # (2, 8, 5, 6) to 18
C8, C4 = conv_weight(CONV, KINDS[0]), conv_weight(CONV, KINDS[4], 4)
IMAGE = CONV.input()
CODES = torch.ones(2, 8, 5, 6, dtype=torch.int8)
RESULT = torch.ones(2, 18, 5, 5)
ONE = torch.tensor(1.0)

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


TABLE = """
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
