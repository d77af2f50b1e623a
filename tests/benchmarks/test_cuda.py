"""The GPU benchmarks rehearsed on the CPU."""

import json
import os

import pytest
import torch

from qkernels.bench import cuda
from qkernels.bench.cuda import TINY, Rehearsal, Row, Run
from qkernels.bench.cuda_crossover import KERNEL, MATMUL, forced, table
from qkernels.bench.cuda_report import TARGETS, report


def test_rehearsal(tmp_path):
    assert cuda.main([str(tmp_path), "--rehearse"]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    names = {(row["group"], row["name"]) for row in found["rows"]}
    assert {("linear", name) for name in cuda.SCHEMES} <= names
    assert {("linear", f"{name}, asked for") for name in cuda.ASKED_FOR} <= names
    assert {("crossover", "kernel"), ("crossover", "dequantize + matmul")} <= names
    assert {("copy", "torch copy_"), ("codec", "qkernels"), ("conv", "W8A8")} <= names
    assert found["left_out"] == {}
    own = next(row for row in found["rows"] if row["name"] == "W8A8" and row["versus"])
    assert own["bytes"] > 0
    text = (tmp_path / "gpu.md").read_text()
    assert "| linear 1 rows 128x64 | NF4 g64 |" in text
    assert "| 16 rows 128x64 W4A16 g128 bf16, gradient |" in text


def test_both_ways_side_by_side():
    times = [("16 rows", KERNEL, 2e-6), ("16 rows", MATMUL, 8e-6), ("32 rows", KERNEL, 1e-6)]
    assert list(table(times))[2:] == ["| 16 rows | 2.0 | 8.0 | 0.25 |"]
    for way, rows in ((KERNEL, str(1 << 60)), (MATMUL, "1")):
        with forced(way):
            assert os.environ["QKERNELS_MATMUL_ROWS"] == rows
    assert "QKERNELS_MATMUL_ROWS" not in os.environ


def test_what_fails_is_left_out():
    run = Run(Rehearsal(), TINY, say=lambda line: None)

    def fails():
        raise RuntimeError("no kernel\nsecond line")

    assert run.time(Row("linear", "1 rows", "A", True, 0), fails) is None
    assert run.time(Row("linear", "2 rows", "A", True, 0), fails) is None
    assert run.left_out == {"linear, A: no kernel": 2}
    run.until = 0.0
    assert run.time(Row("linear", "1 rows", "B", True, 0), lambda: [lambda: None]) is None
    assert run.left_out["linear, B: the time was up"] == 1


def test_copies_exceed_the_cache_twice():
    run = Run(Rehearsal(), TINY)
    assert run.copies(1 << 20) == 2
    assert run.copies(1 << 10) == 8
    assert run.copies(1) == 64


def test_targets_by_hand():
    copy = Row("copy", "x", "torch copy_", False, 1.0, 100.0)
    codec = Row("codec", "x", "qkernels", True, 1.0, 90.0)
    slow = Row("linear", "1 rows 8x8", "W8A8", True, 1.0, 4e7)
    twice = Row("linear", "16 rows 8x8", "NF4 g64", True, 1.0, 1.0, 1.0, {"matmul bf16": 3.0})
    values = [[t.value(row, 1e8) for t in TARGETS] for row in (codec, slow, twice)]
    assert [i for i, v in enumerate(values[0]) if v is not None] == [0]
    assert values[1][1] == 0.4
    assert values[2][3] == 3.0
    text = report([copy, codec, slow, twice], {"device": "none"}, {})
    assert (
        "| quantize, dequantize: share of the copy rate | ≥ 0.85 | 1 of 1 | 0.90 … 0.90 |" in text
    )
    assert "| not measured |" in text


without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@without_gpu
def test_without_a_gpu_nothing_is_measured(tmp_path, capsys):
    assert cuda.main([str(tmp_path / "out")]) == 1
    assert "there is no GPU here" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
