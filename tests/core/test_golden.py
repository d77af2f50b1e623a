"""Bytes that saved files consist of, committed: they must mean the same in every later version.

golden.json was made once, with tests/helpers and not with the kernels. A change that makes these
tests fail needs a new layout version or a new format, not a new golden.json: as the asymmetric int4
entries did, once, when their zero points came to count in eighths of a code.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import reference as ref
from helpers.check import same_bits, same_tensor

ops = torch.ops.qkernels

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def tensor(entry: dict[str, Any]) -> Tensor:
    """Its bytes are in the file as hexadecimal digits, little-endian."""
    raw = torch.tensor(list(bytes.fromhex(entry["bytes"])), dtype=torch.uint8)
    return raw.view(getattr(torch, entry["dtype"])).reshape(entry["shape"])


QUANTIZED = [pytest.param(entry, id=entry["name"]) for entry in GOLDEN["quantized"]]
PACKED = [pytest.param(entry, id=entry["name"]) for entry in GOLDEN["packed"]]


@pytest.mark.parametrize("entry", QUANTIZED)
def test_quantized_bytes(entry: dict[str, Any]) -> None:
    x = tensor(GOLDEN["input"])
    options = (
        entry["format"],
        entry["group_size"],
        entry["symmetric"],
        DTYPES[entry["scale_dtype"]],
    )
    for got, name in zip(ops.quantize(x, *options), ("data", "scale", "zero_point"), strict=True):
        same_tensor(got, tensor(entry[name]))


@pytest.mark.parametrize("entry", QUANTIZED)
def test_dequantized_bytes(entry: dict[str, Any]) -> None:
    data, scale, zero, want = (tensor(entry[n]) for n in ("data", "scale", "zero_point", "values"))
    given = None if entry["symmetric"] else zero
    got = ops.dequantize(
        data, scale, given, entry["format"], entry["group_size"], want.shape[-1], torch.float32
    )
    same_tensor(got, want)


@pytest.mark.parametrize("entry", PACKED)
def test_packed_bytes(entry: dict[str, Any]) -> None:
    data, scale, zero, packed = (
        tensor(entry[n]) for n in ("data", "scale", "zero_point", "packed")
    )
    layout, k, group_size = entry["layout"], entry["in_features"], entry["group_size"]
    given = zero if zero.numel() else None
    same_tensor(ops.pack(data, scale, given, layout, k, group_size), packed)
    back = ops.unpack(packed, layout, k, len(data), group_size)
    for got, want in zip(back, (data, scale, zero), strict=True):
        same_tensor(got, want)


@pytest.mark.parametrize("entry", PACKED)
def test_results_from_packed_bytes(entry: dict[str, Any]) -> None:
    """A product of committed bytes, with the integer path where there is one."""
    x, packed = tensor(GOLDEN["activation"]), tensor(entry["packed"])
    sizes = (entry["layout"], entry["in_features"], entry["out_features"], entry["group_size"])
    for activation, want in entry["products"].items():
        y = ops.linear(x, packed, None, None, None, None, None, *sizes, int(activation), 0)
        same_bits(y, ref.values(tensor(want)))
