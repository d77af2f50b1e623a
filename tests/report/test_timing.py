"""The timing helper: order, counts and statistics, without asserting any speed."""

import pytest

from qkernels.timing import Timing, interleave


def test_rounds_interleave_and_turn():
    calls = []
    times = interleave(
        {name: lambda name=name: calls.append(name) for name in "abc"},
        warmup=1,
        min_rounds=3,
        max_rounds=3,
    )
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert list(times) == ["a", "b", "c"]
    assert all(len(timing.samples) == 3 for timing in times.values())


def test_budget_ends_the_rounds_but_not_before_the_minimum():
    times = interleave({"a": lambda: None}, min_rounds=4, max_rounds=1000, budget=0.0)
    assert len(times["a"].samples) == 4


def test_statistics():
    timing = Timing((1.0, 2.0, 3.0, 4.0, 10.0))
    assert (timing.median, timing.min, timing.iqr) == (3.0, 1.0, 2.0)
    assert Timing((1.0, 2.0)).median == 1.5
    assert Timing((1.0,)).iqr == 0.0
    assert timing.to_dict() == {"median_s": 3.0, "min_s": 1.0, "iqr_s": 2.0, "samples": 5}


@pytest.mark.parametrize(
    "wrong", [{"warmup": -1}, {"min_rounds": 0}, {"min_rounds": 3, "max_rounds": 2}]
)
def test_wrong_counts_are_refused_with_their_values(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        interleave({"a": lambda: None}, **wrong)


def test_nothing_to_time_is_refused():
    with pytest.raises(ValueError, match="at least one callable"):
        interleave({})
