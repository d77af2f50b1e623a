"""Observers against searches in plain numpy, on distributions that differ, whole and in pieces."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import qkernels as qk
from qkernels.calibration import OBSERVERS
from qkernels.calibration.histogram import Histogram
from qkernels.calibration.search import SquaredError, kl_divergence

BINS = 4096


def draw(kind, size=20_000):
    random = np.random.default_rng(3)
    x = {
        "normal": lambda: random.normal(size=size),
        "shifted": lambda: random.normal(1.5, size=size),
        "laplace": lambda: random.laplace(size=size),
        "uniform": lambda: random.uniform(-3, 1, size),
        "relu": lambda: np.maximum(random.normal(size=size), 0),
        "negative": lambda: -random.gamma(2, size=size),
        "heavy": lambda: random.standard_t(2.5, size=size),
        "outlier": lambda: np.append(random.normal(size=size - 1), 60.0),
        "large": lambda: random.normal(size=size) * 1e30,
        "small": lambda: random.laplace(size=size) * 1e-30,
    }[kind]()
    return x.astype(np.float32)


KINDS = "normal shifted laplace uniform relu negative heavy outlier large small".split()
each_kind = pytest.mark.parametrize("kind", KINDS)
each_symmetry = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])


def observed(name, x, pieces=5):
    observer = OBSERVERS[name]()
    for piece in np.array_split(x, pieces):
        observer.observe(torch.from_numpy(piece))
    return observer


def counts_of(x):
    """Signed counts and width, as histogram.py describes them, from all values at once."""
    width = 2.0 ** (math.frexp(float(np.abs(x).max()))[1] - 12)
    bins = np.floor(x[x != 0].astype(np.float64) / width).astype(int) + BINS
    return np.bincount(bins, minlength=2 * BINS), width


def fake_quantize(x, low, high, symmetric):
    """int8 quantization in float64 as NUMERICS.md has it, without its roundings to float32."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(-low, high) / 127 if symmetric else (high - low) / 255
    zero = 0 if symmetric else np.clip(np.rint(-128 - low / scale), -128, 127)
    codes = np.clip(np.rint(x / scale) + zero, -127 if symmetric else -128, 127)
    return (codes - zero) * scale


# ---- each against its definition ----------------------------------------------------------------


@each_kind
def test_minmax(kind):
    x = draw(kind)
    expected = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    assert observed("minmax", x).range(True) == observed("minmax", x).range(False) == expected


def test_moving_average():
    random = np.random.default_rng(0)
    calls = [random.normal(size=50).astype(np.float32) * k for k in (1, 3, 2, 9, 1, 4, 5, 2)]
    observer = qk.calibration.MovingAverageObserver(0.25)
    for x in calls:
        observer.observe(torch.from_numpy(x))
    low = high = 0.0
    for i, x in enumerate(calls):
        # The first four evenly, the others with weight 1/4.
        weight = 1 / (i + 1) if i < 4 else 0.25
        low, high = low + weight * (x.min() - low), high + weight * (x.max() - high)
    assert observer.range() == pytest.approx((low, high), rel=1e-6)
    even = qk.calibration.MovingAverageObserver()
    for x in calls:
        even.observe(torch.from_numpy(x))
    assert even.range()[1] == pytest.approx(np.mean([x.max() for x in calls]), rel=1e-6)


@each_kind
@pytest.mark.parametrize("percentile", [60, 99, 99.9, 100])
def test_percentile(kind, percentile):
    x = draw(kind)
    observer = qk.calibration.PercentileObserver(percentile)
    for piece in np.array_split(x, 3):
        observer.observe(torch.from_numpy(piece))
    _, width = counts_of(x)
    magnitude = np.quantile(np.abs(x), percentile / 100)
    low, high = observer.range(symmetric=True)
    # Where values lie far apart, the quantile between them is a matter of taste.
    gap = np.diff(np.sort(np.abs(x))[-int(len(x) * (1 - percentile / 100)) - 2 :]).max(initial=0)
    assert max(-low, high) == pytest.approx(magnitude, abs=width + float(gap))
    tail = (1 - percentile / 100) / 2
    low, high = observer.range(symmetric=False)
    expected_low, expected_high = np.quantile(x, [tail, 1 - tail])
    assert low == pytest.approx(min(expected_low, 0), abs=width + float(gap))
    assert high == pytest.approx(max(expected_high, 0), abs=width + float(gap))


def test_percentile_of_nearly_nothing_but_zeros():
    x = torch.zeros(100_000)
    x[:3] = torch.tensor([0.5, 2.0, 1.0])
    observer = qk.calibration.PercentileObserver(99.9)
    observer.observe(x)
    assert observer.range() == observer.range(False) == (0.0, 2.0)


@each_kind
@each_symmetry
def test_mse_is_as_good_as_a_search_over_the_values_themselves(kind, symmetric):
    x = draw(kind)
    wide = x.astype(np.float64)
    low, high = min(wide.min(), 0.0), max(wide.max(), 0.0)

    def error(begin, end):
        return np.mean((wide - fake_quantize(wide, begin, end, symmetric)) ** 2)

    if symmetric:
        amax = max(-low, high)
        best = min(error(-t, t) for t in np.linspace(amax / 300, amax, 300))
    else:
        ends = 2.0 ** -np.linspace(0, 4, 17)
        lows = low * ends if low < 0 else [0.0]
        highs = high * ends if high > 0 else [0.0]
        best = min(error(begin, end) for begin in lows for end in highs)
    assert error(*observed("mse", x).range(symmetric)) <= 1.02 * best
    # Otherwise this could not fail: some range is better than all that was seen.
    if symmetric and kind != "uniform":
        assert best < 0.98 * error(low, high)


@each_kind
@each_symmetry
def test_squared_error_of_values_spread_evenly_in_their_bins(kind, symmetric):
    histogram = Histogram(64)
    histogram.add(torch.from_numpy(draw(kind)))
    parts = (np.arange(500) + 0.5) / 500
    values = (np.arange(-64, 64)[:, None] + parts).ravel()
    weights = np.repeat(histogram.counts / 500, 500)
    for low, high in ((-60.0, 60.0), (-7.3, 40.0), (0.0, 11.0), (-30.0, 0.0)):
        error = SquaredError(histogram)
        got = (
            error.symmetric(np.array([max(-low, high)]))
            if symmetric
            else error.asymmetric(np.array([low]), np.array([high]))
        )
        ends = (-max(-low, high), max(-low, high)) if symmetric else (low, high)
        expected = weights @ (values - fake_quantize(values, *ends, symmetric)) ** 2
        assert got[0] == pytest.approx(expected, rel=1e-3)


def divergence(counts, begin, end, levels):
    """KL divergence of bins clipped to begin … end - 1 from the same in levels, step by step."""
    reference = counts[begin:end].astype(np.float64)
    level = np.arange(end - begin) * levels // (end - begin)
    quantized = np.zeros_like(reference)
    for which in np.unique(level):
        inside = (level == which) & (reference > 0)
        if inside.any():
            quantized[inside] = reference[inside].sum() / inside.sum()
    reference[0] += counts[:begin].sum()
    reference[-1] += counts[end:].sum()
    if not quantized.any():
        return np.inf
    p, q = reference / reference.sum(), quantized / quantized.sum()
    if ((p > 0) & (q == 0)).any():
        return np.inf
    return np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0]))


@each_kind
@each_symmetry
def test_histogram_minimizes_the_kl_divergence(kind, symmetric):
    x = draw(kind)
    signed, width = counts_of(x)
    low, high = observed("histogram", x).range(symmetric)
    amax = float(np.abs(x).max())

    def of(threshold):
        if symmetric:
            magnitudes = signed[BINS:] + signed[:BINS][::-1]
            return divergence(magnitudes, 0, threshold, 128)
        used = np.flatnonzero(signed)
        first, last = min(used[0], BINS), max(used[-1] + 1, BINS)
        begin, end = max(first, BINS - threshold), min(last, BINS + threshold)
        return divergence(signed, begin, end, 256) if end - begin >= 256 else np.inf

    limit = math.ceil(amax / width)
    if math.floor(amax / width) == limit:
        limit += 1
    chosen = min(math.ceil(max(-low, high) / width), limit)
    others = np.unique(np.linspace(128, limit, 200).astype(int))
    best = min(of(threshold) for threshold in others)
    assert of(chosen) <= best * (1 + 1e-9) + 1e-12
    if kind == "outlier":
        assert high < 0.2 * amax


@each_kind
@pytest.mark.parametrize("levels", [128, 256])
def test_kl_divergence(kind, levels):
    counts, _ = counts_of(draw(kind))
    ranges = np.array([(BINS - 400, BINS + 400), (BINS, BINS + 700), (3000, 6000), (0, 2 * BINS),
                       (BINS - 2000, BINS + 300), (BINS - 131, BINS + 130)])  # fmt: skip
    got = kl_divergence(counts, ranges[:, 0], ranges[:, 1], levels)
    expected = [divergence(counts, begin, end, levels) for begin, end in ranges]
    assert np.isfinite(expected).any()
    np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-12)


@each_symmetry
def test_histogram_clips_an_outlier_and_keeps_a_uniform_range(symmetric):
    low, high = observed("histogram", draw("uniform")).range(symmetric)
    assert max(-low, high) > 2.9


# ---- what all of them keep ----------------------------------------------------------------------

floats = arrays.arrays(
    np.float32,
    st.integers(1, 40),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)
each_observer = pytest.mark.parametrize("name", OBSERVERS)


@each_observer
@given(x=floats, cut=st.integers(0, 40))
def test_any_values_give_a_range_within_what_was_seen(name, x, cut):
    whole = OBSERVERS[name]()
    whole.observe(torch.from_numpy(x))
    pieces = OBSERVERS[name]()
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf])
    for piece in (x[:cut], x[cut:]):
        pieces.observe(torch.cat([torch.from_numpy(piece), bad]))
        pieces.observe(torch.empty(0))
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    for symmetric in (True, False):
        chosen = whole.range(symmetric)
        assert low <= chosen[0] <= 0 <= chosen[1] <= high
        assert chosen != (0, 0) or not x.any()
        if name != "moving_average":
            assert pieces.range(symmetric) == chosen


@each_observer
@pytest.mark.parametrize("value", [0.0, 3.5, -1e-40])
def test_a_constant_is_its_own_range(name, value):
    observer = OBSERVERS[name]()
    observer.observe(torch.full((7,), value))
    value = float(np.float32(value))
    assert observer.range() == observer.range(False) == (min(value, 0.0), max(value, 0.0))


@each_observer
def test_without_values_there_is_no_range(name):
    observer = OBSERVERS[name]()
    observer.observe(torch.tensor([torch.nan, torch.inf]))
    observer.observe(torch.empty(0, 3))
    with pytest.raises(ValueError, match=r"Observer\(.*has seen no finite value"):
        observer.range()


@each_observer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_and_strides(name, dtype):
    x = torch.randn(40, 60, generator=torch.Generator().manual_seed(0)).to(dtype).t()[::2]
    observer, other = OBSERVERS[name](), OBSERVERS[name]()
    observer.observe(x)
    other.observe(x.float().contiguous())
    assert observer.range() == other.range()


@given(x=floats, cuts=st.lists(st.integers(0, 40), max_size=3))
def test_a_histogram_is_the_same_however_it_grew(x, cuts):
    whole, grown = Histogram(16), Histogram(16)
    whole.add(torch.from_numpy(x))
    order = np.argsort(np.abs(x), kind="stable")
    for piece in np.split(x[order], sorted(cuts)):
        if piece.size:
            grown.add(torch.from_numpy(piece))
    assert (grown.width, grown.zeros) == (whole.width, whole.zeros)
    np.testing.assert_array_equal(grown.counts, whole.counts)
    assert whole.counts.sum() + whole.zeros == x.size


@each_kind
def test_histogram_counts(kind):
    x = draw(kind)
    histogram = Histogram()
    for piece in np.array_split(x, 7):
        histogram.add(torch.from_numpy(piece))
    counts, width = counts_of(x)
    assert histogram.width == width
    np.testing.assert_array_equal(histogram.counts, counts)
    assert histogram.zeros == np.count_nonzero(x == 0)


def test_a_histogram_of_more_than_a_chunk():
    x = torch.randn(600_001, generator=torch.Generator().manual_seed(0)).relu()
    histogram = Histogram()
    histogram.add(x)
    counts, _ = counts_of(x.numpy())
    np.testing.assert_array_equal(histogram.counts, counts)


@pytest.mark.parametrize(
    "make",
    [
        lambda: qk.calibration.PercentileObserver(0.999),
        lambda: qk.calibration.PercentileObserver(101),
        lambda: qk.calibration.MovingAverageObserver(0),
        lambda: qk.calibration.MovingAverageObserver(float("nan")),
    ],
)
def test_bad_settings_are_refused(make):
    with pytest.raises(ValueError, match="expected"):
        make()
