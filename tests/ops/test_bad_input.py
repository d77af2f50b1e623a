"""Every wrong argument gets a sentence: the op, the argument, what it expects, what it got.

The wrong calls are in the TABLE of each bad_*.py: op by op what is called, and below it a piece of
the sentence that it must give.
"""

from types import ModuleType
from typing import Any

import pytest
import torch

from helpers.data import KINDS, floats

from . import bad_conv, bad_int8, bad_linear, bad_quantize, bad_transformer

ops = torch.ops.qkernels
MODULES = (bad_quantize, bad_linear, bad_conv, bad_int8, bad_transformer)


def cases() -> list[Any]:
    found, op = [], ""
    for module in MODULES:
        lines = iter(module.TABLE.strip().splitlines())
        for line in lines:
            if line.endswith(":") and not line.startswith(" "):
                op = line.removesuffix(":")
            else:
                call, sentence = line.strip(), next(lines).strip()
                found.append(pytest.param(module, op, call, sentence, id=call))
    return found


@pytest.mark.parametrize(("module", "op", "call", "sentence"), cases())
def test_sentence(module: ModuleType, op: str, call: str, sentence: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        eval(call, vars(module))
    message = str(caught.value).splitlines()[0]
    assert message.startswith(f"qkernels::{op}: ")
    assert sentence in message
    assert ".cpp:" not in message


def test_every_op_has_bad_calls() -> None:
    names = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("qkernels::")}
    tested = {case.values[1] for case in cases()}
    # The same functions in C++ as linear and conv, so they speak as those do.
    known = tested | {"linear_differentiable", "conv_differentiable"}
    assert {name.removeprefix("qkernels::") for name in names} == known


def test_nothing_is_written_when_a_check_fails() -> None:
    data = torch.full((3, 8), 5, dtype=torch.int8)
    with pytest.raises(RuntimeError, match="scale must have shape"):
        bad_quantize.quantize_out(data=data, scale=torch.empty(4, 1))
    assert (data == 5).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_too_little_memory(threads: int) -> None:
    """For copies, results and what is computed with, also on other threads."""
    keys = floats((1, 1, 4)).expand(1, 2**37, 4)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for call in (
            lambda: ops.quantize(bad_quantize.X.expand(2**40, 3, 8), bad_quantize.INT8),
            lambda: ops.lookup(
                torch.ones(1, dtype=torch.int8).expand(2**45), bad_quantize.BYTES.repeat(8)
            ),
            lambda: ops.attention(floats((1, 300, 4)), keys, keys, None, 1, 1.0, False),
        ):
            with pytest.raises(RuntimeError, match="^qkernels: .*could not allocate"):
                call()
    finally:
        torch.set_num_threads(before)


def test_rows_without_elements_take_no_time() -> None:
    many = torch.empty(2**40, 0)
    data, scale, _ = ops.quantize(many, bad_quantize.INT8, None)
    ops.quantize_with(many, scale, None, bad_quantize.INT8, None)
    ops.dequantize(data, scale, None, bad_quantize.INT8, None, 0, torch.float32)
    ops.fake_quantize(many, bad_quantize.INT8)
    ops.fake_quantize_with(many, scale, None, bad_quantize.INT8, None)
    codes, scales = data.view(torch.uint8), many.to(KINDS[6].scale_dtype)
    layout = KINDS[6].layout
    packed = ops.pack(codes, scales, None, layout, 0, 4)
    ops.unpack(packed, layout, 0, 2**40, 4)
    packed = ops.pack_conv(codes, scales, None, layout, 1, 0, 2**40, 4)
    ops.unpack_conv(packed, layout, 1, 0, 2**40, 2**40, 4)


def test_layouts_of_other_kinds_of_tensors() -> None:
    """Sparse, quantized or nested tensors have no kernel; torch says so."""
    x = bad_linear.X
    for strange in (x.to_sparse(), x.to_mkldnn()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            bad_linear.linear(strange)
