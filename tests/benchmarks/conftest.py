"""A run made up of round numbers, so that what is derived from it can be checked by hand."""

import pytest

from helpers.bench import result
from qkernels.bench.results import Record, Results


def product(m: int, own: float, peer: float, fp32: float) -> Record:
    """A layer of 16 Mi weights; memory at 16 GB/s reads its 16 MiB in 1.05 ms."""
    record = Record("linear 4096x4096", "linear", {"k": 4096, "n": 4096, "m": m}, "avx512", 2)
    record.limits = {"read": 16e9, "int8": 800e9, "fp32": 200e9}
    record.results = [
        result("W8A8", "8 bits", True, own, arithmetic="int8", bits=8.0),
        result("torch.ao x86", "8 bits", False, peer, arithmetic="int8", bits=8.0),
        result("torch int8pack bf16", "8 bits", False, 2 * peer, bits=8.0),
        result("torch fp32", "float", False, fp32, arithmetic="fp32", bits=32.0, faults=3.0),
    ]
    return record


def run(factor: float = 1.0) -> Results:
    """Two cases; `factor` scales the times of qkernels."""
    about = {
        "time": "2026-01-01T00:00:00+0000",
        "machine": {
            "cpu": "A CPU",
            "isa": "avx512",
            "threads": "2",
            "cores": 2,
            "cache": 32 << 20,
            "qkernels": "0.1.0",
        },
        "versions": {"torch": "2.13.0", "numpy": "not installed"},
        "build": {},
        "commit": "abc",
        "environment": {},
        "options": {},
    }
    limits = {"read": {"1": 10e9, "2": 16e9}, "vnni_512": {"1": 400e9, "2": 800e9}}
    records = [
        product(1, 1.1e-3 * factor, 2.2e-3, 4.4e-3),
        product(512, 20e-3 * factor, 21e-3, 90e-3),
    ]
    return Results(about, limits, {"openvino": "not installed"}, ["linear 4096x4096"], records)


@pytest.fixture
def results() -> Results:
    return run()


@pytest.fixture
def slower() -> Results:
    return run(1.5)
