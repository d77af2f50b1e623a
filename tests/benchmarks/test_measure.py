"""Turns, rotation, and what a contender is left out for."""

import hashlib
import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import qkernels.bench.measure
from qkernels.bench.engines import WrongResultError, sqnr, verified
from qkernels.bench.measure import DISTURBED, Effort, keep_freed_memory, measure, rotate, settle

TINY = Effort(min_rounds=4, max_rounds=4, budget=0.0, turn=0.0005, max_calls=3)


def test_every_contender_is_measured_in_every_round() -> None:
    calls = {"a": 0, "b": 0}
    rounds = []

    def count(name: str) -> None:
        calls[name] += 1

    found = measure(
        {"a": lambda: count("a"), "b": lambda: count("b")},
        TINY,
        each_round=lambda: rounds.append(1),
    )
    assert list(found) == ["a", "b"]
    assert len(rounds) == TINY.max_rounds
    for name, measured in found.items():
        assert len(measured.timing.samples) == TINY.max_rounds * TINY.max_calls
        assert calls[name] > len(measured.timing.samples)  # the untimed calls
        assert measured.faults >= 0


def test_a_slow_call_is_timed_once_a_turn() -> None:
    found = measure({"slow": lambda: time.sleep(0.002)}, TINY)
    assert len(found["slow"].timing.samples) == TINY.max_rounds
    assert found["slow"].timing.min >= 0.002


def test_waiting_for_a_core_is_seen() -> None:
    cores = os.sched_getaffinity(0)
    data = bytes(1 << 21)
    os.sched_setaffinity(0, {min(cores)})  # threads that start now share one core
    try:
        with ThreadPoolExecutor(2) as pool:
            crowd = measure({"crowd": lambda: list(pool.map(hashlib.sha256, [data] * 2))}, TINY)
    finally:
        os.sched_setaffinity(0, cores)
    assert crowd["crowd"].waited > DISTURBED


def test_disturbed_turns_are_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = itertools.chain([0.0, 10.0], itertools.repeat(20.0))
    monkeypatch.setattr(qkernels.bench.measure, "_waits", lambda: next(waits))
    calls = []
    found = measure({"a": lambda: calls.append(1)}, TINY)
    assert found["a"].waited == 0.0
    assert len(found["a"].timing.samples) == TINY.max_rounds * TINY.max_calls
    monkeypatch.setattr(qkernels.bench.measure, "_waits", itertools.count().__next__)
    assert measure({"a": lambda: None}, TINY)["a"].waited > DISTURBED  # and it ends


def test_the_hopeless_get_two_rounds() -> None:
    contenders = {"fast": lambda: None, "slow": lambda: time.sleep(0.01)}
    found = measure(contenders, TINY, kinds={"fast": "same", "slow": "same"})
    assert len(found["slow"].timing.samples) == 2
    found = measure(contenders, TINY, kinds={"fast": "one", "slow": "another"})
    assert len(found["slow"].timing.samples) == TINY.max_rounds


def test_rotation_takes_every_copy_in_turn() -> None:
    seen: list[int] = []
    turn = rotate([lambda x, i=i: seen.append(i + x) for i in range(3)])
    for _ in range(4):
        turn(10)
    assert seen == [10, 11, 12, 10]


def test_settling_has_an_end() -> None:
    start = time.perf_counter()
    settle(0.05)
    assert time.perf_counter() - start < 1.0


def test_the_c_library_takes_the_setting() -> None:
    assert keep_freed_memory()


def test_right_results_pass() -> None:
    reference = torch.randn(8, 64)
    assert verified("x", "8 bits", reference, reference + 0.01 * torch.randn(8, 64)) > 28


@pytest.mark.parametrize(
    "wrong",
    [
        lambda y: -y,
        lambda y: 2 * y,
        lambda y: y.flip(0),
        lambda y: y.masked_fill(y > 2, torch.nan),
        lambda y: y[:, :-1],
    ],
)
def test_wrong_results_are_caught(wrong) -> None:
    reference = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(WrongResultError, match="x: "):
        verified("x", "4 bits", reference, wrong(reference))


def test_sqnr_of_an_exact_result_is_infinite() -> None:
    assert sqnr(torch.ones(3), torch.ones(3)) == float("inf")
