"""Wrong calls of the ops on int8 codes, for test_bad_input.py."""

from typing import Any

import torch

from helpers.int8 import codes

ops = torch.ops.qkernels

IMAGE = codes((2, 6, 5, 7))
SCALE, ZERO = torch.tensor(0.5), torch.tensor([3], dtype=torch.int8)
TABLE256 = codes((256,))
PAIR = torch.tensor([0.5, 0.25])
HUGE = 2**63 - 1


def max_pool(x: Any = IMAGE, **change: Any) -> Any:
    sizes = {"kernel_size": [3, 3], "stride": [2, 2], "padding": [1, 1], "dilation": [1, 1]}
    return ops.max_pool(x, *{**sizes, "ceil_mode": False, **change}.values())


def avg_pool(x: Any = IMAGE, **change: Any) -> Any:
    ranges = {"x_scale": SCALE, "x_zero_point": ZERO, "y_scale": None, "y_zero_point": None}
    sizes = {"kernel_size": [3, 3], "stride": [2, 2], "padding": [1, 1], "ceil_mode": False}
    rest = {"count_include_pad": True, "divisor_override": None, "dtype": None}
    assert change.keys() <= {**ranges, **sizes, **rest}.keys()
    return ops.avg_pool(x, *{**ranges, **sizes, **rest, **change}.values())


def adaptive_avg_pool(x: Any = IMAGE, **change: Any) -> Any:
    ranges = {"x_scale": SCALE, "x_zero_point": ZERO, "y_scale": None, "y_zero_point": None}
    sizes = {"output_size": [2, 2], "dtype": None}
    return ops.adaptive_avg_pool(x, *{**ranges, **sizes, **change}.values())


def add(a: Any = IMAGE, b: Any = IMAGE, **change: Any) -> Any:
    ranges = {"a_scale": SCALE, "a_zero_point": ZERO, "b_scale": SCALE, "b_zero_point": None}
    rest = {"y_scale": SCALE, "y_zero_point": ZERO, "epilogue": 0, "dtype": None}
    return ops.add(a, b, *{**ranges, **rest, **change}.values())


def concat(xs: Any = (IMAGE, IMAGE), **change: Any) -> Any:
    ranges = {"scales": PAIR, "zero_points": None, "y_scale": SCALE, "y_zero_point": None}
    return ops.concat(list(xs), *{**ranges, "dim": 1, **change}.values())


def lookup(x: Any = IMAGE, table: Any = TABLE256) -> Any:
    return ops.lookup(x, table)


TABLE = """
max_pool:
  max_pool(IMAGE.float())
    x must be int8, got float32; convert it with .to(torch.int8)
  max_pool(IMAGE[0, 0])
    x must have shape (batch, channels, 1 to 3 spatial dimensions), got (5, 7); give a single image
  max_pool(IMAGE.view(2, 6, 5, 7, 1, 1))
    x must have shape (batch, channels, 1 to 3 spatial dimensions), got (2, 6, 5, 7, 1, 1)
  max_pool(IMAGE[0])
    kernel_size must have 1 entries, one for each spatial dimension, got 2
  max_pool(stride=[2])
    stride must have 2 entries, one for each spatial dimension, got 1
  max_pool(padding=[])
    padding must have 2 entries, one for each spatial dimension, got 0
  max_pool(kernel_size=[3, 0])
    kernel_size must be from 1 to 16777216, got 0
  max_pool(kernel_size=[HUGE, HUGE])
    kernel_size must be from 1 to 16777216, got 9223372036854775807
  max_pool(stride=[-1, 1])
    stride must be from 1 to 16777216, got -1
  max_pool(dilation=[1, HUGE])
    dilation must be from 1 to 16777216, got 9223372036854775807
  max_pool(padding=[-1, 0])
    padding must be from 0 to 16777216, got -1
  max_pool(padding=[1, 2])
    padding must be at most half of kernel_size, got padding (1, 2) for kernel_size (3, 3)
  max_pool(kernel_size=[9, 3], padding=[0, 0])
    the result would be empty: x (2, 6, 5, 7) with kernel_size (9, 3), padding (0, 0) and dilation
  max_pool(IMAGE[:, :, :0])
    the result would be empty: x (2, 6, 0, 7)
avg_pool:
  avg_pool(IMAGE.to(torch.uint8))
    x must be int8, got uint8
  avg_pool(x_scale=PAIR)
    x_scale must have one element (per tensor), got (2,)
  avg_pool(x_scale=SCALE.double())
    x_scale must be float32, got float64
  avg_pool(x_scale=-SCALE)
    x_scale must be a positive, finite, normal number, got -0.5; calibrate again
  avg_pool(x_zero_point=SCALE)
    x_zero_point must be int8, got float32
  avg_pool(y_zero_point=ZERO)
    y_zero_point needs y_scale
  avg_pool(y_scale=SCALE * 0)
    y_scale must be a positive, finite, normal number, got 0
  avg_pool(y_scale=SCALE, dtype=torch.float32)
    y_scale gives int8 codes but dtype is float32; leave dtype out
  avg_pool(dtype=torch.float64)
    dtype must be torch.float32, torch.bfloat16 or torch.float16, got torch.float64
  avg_pool(divisor_override=0)
    divisor_override must be from 1 to 2147483647, got 0
  avg_pool(divisor_override=2**31)
    divisor_override must be from 1 to 2147483647, got 2147483648
  avg_pool(IMAGE[..., :1, :1, None], kernel_size=[2**24] * 3, stride=[1] * 3, padding=[2**23] * 3)
    a window would have 4.72237e+21 elements with its borders, which is too many to count
  avg_pool(kernel_size=[3])
    kernel_size must have 2 entries, one for each spatial dimension, got 1
  avg_pool(IMAGE.new_zeros(1, 1, 3000, 3000), kernel_size=[3000, 3000], padding=[0, 0])
    an int32 sum over 9e+06 codes can overflow (the limit is 8421504); pool in two steps
adaptive_avg_pool:
  adaptive_avg_pool(IMAGE.int())
    x must be int8, got int32
  adaptive_avg_pool(output_size=[2])
    output_size must have 2 entries, one for each spatial dimension, got 1
  adaptive_avg_pool(output_size=[0, 2])
    output_size must be from 1 to 16777216, got 0
  adaptive_avg_pool(IMAGE[:, :, :, :0])
    x (2, 6, 5, 0) has a spatial dimension of size 0, of which there is no mean
  adaptive_avg_pool(x_scale=PAIR)
    x_scale must have one element (per tensor), got (2,)
  adaptive_avg_pool(output_size=[2**24, 2**24])
    the result would have 3.3777e+15 elements, more than fit into memory
  adaptive_avg_pool(IMAGE.new_zeros(1, 1, 3000, 3000), output_size=[1, 1])
    an int32 sum over 9e+06 codes can overflow (the limit is 8421504); pool in two steps
add:
  add(IMAGE.float())
    a must be int8, got float32
  add(b=IMAGE.float())
    b must be int8, got float32
  add(b=IMAGE[:1])
    a and b must have the same shape, got (2, 6, 5, 7) and (1, 6, 5, 7); expand the smaller one
  add(a_scale=PAIR)
    a_scale must have one element (per tensor), got (2,)
  add(b_scale=SCALE / 0)
    b_scale must be a positive, finite, normal number, got inf
  add(b_zero_point=ZERO.int())
    b_zero_point must be int8, got int32
  add(y_scale=None)
    y_zero_point needs y_scale
  add(dtype=torch.bfloat16)
    y_scale gives int8 codes but dtype is bfloat16; leave dtype out
  add(epilogue=7)
    epilogue must be a code from 0 to 6
concat:
  concat([])
    xs must hold at least one tensor, got none
  concat([ZERO[0], ZERO[0]], dim=0)
    xs must have at least one dimension, got scalars
  concat([IMAGE, IMAGE.float()])
    xs[1] must be int8, got float32
  concat([IMAGE, IMAGE[:1]])
    xs[1] must have the shape of xs[0], (2, 6, 5, 7), but for dimension 1, got (1, 6, 5, 7)
  concat([IMAGE, IMAGE[0]])
    xs[1] must have the shape of xs[0], (2, 6, 5, 7), but for dimension 1, got (6, 5, 7)
  concat(dim=4)
    dim must be from -4 to 3, got 4
  concat(dim=-HUGE)
    dim must be from -4 to 3, got -9223372036854775807
  concat(scales=SCALE)
    scales must have shape (2,), got ()
  concat(scales=PAIR.double())
    scales must be float32, got float64
  concat(scales=PAIR * 0)
    scales must be positive, finite, normal numbers, got 0 at 0; calibrate again
  concat(zero_points=ZERO)
    zero_points must have shape (2,), got (1,)
  concat(y_scale=PAIR)
    y_scale must have one element (per tensor), got (2,)
lookup:
  lookup(IMAGE.float())
    x must be int8, got float32
  lookup(table=TABLE256[1:])
    table must have shape (256,), got (255,)
  lookup(table=TABLE256.int())
    table must be int8, got int32
"""
