"""Results made up of round numbers."""

import dataclasses
from typing import Any

from qkernels.bench.plan import Conv
from qkernels.bench.results import Record, Result


def result(name: str, kind: str, own: bool, median: float, **more: Any) -> Result:
    fields = {"min": median, "iqr": median / 10, "samples": 5, "faults": 0.0, **more}
    return Result(name, kind, own, median, **fields)


def convolution(shape: Conv, own: float = 1e-3, peer: float = 2e-3) -> Record:
    """A record of W8A8 and a peer at 800 Gop/s, with a faster peer that solves another task."""
    record = Record(f"conv {shape}", "conv", dataclasses.asdict(shape), "avx512", 2)
    record.limits = {"int8": 800e9}
    record.results = [
        result("W8A8", "8 bits", True, own, arithmetic="int8", bits=8.0),
        result("torch.ao x86", "8 bits", False, peer, arithmetic="int8", bits=8.0),
        result("torch.ao x86 from float", "8 bits from float", False, peer / 4, bits=8.0),
    ]
    return record
