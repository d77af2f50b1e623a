"""Ratios, shares of the limit, targets, and the pages made of them."""

import dataclasses

import pytest

from helpers.bench import convolution, result
from qkernels.bench import analysis
from qkernels.bench.compare import comparison
from qkernels.bench.plan import CONVS
from qkernels.bench.results import Record, Results
from qkernels.bench.table import markdown, microseconds, table
from qkernels.bench.targets import TARGETS, Outcome


def test_the_limit_is_the_longer_of_reading_and_multiplying(results: Results) -> None:
    one, many = results.records
    assert analysis.limit_seconds(one, one.results[0]) == pytest.approx(2**24 / 16e9)
    assert analysis.limit_seconds(many, many.results[0]) == pytest.approx(2 * 512 * 2**24 / 800e9)
    assert analysis.share(one, one.results[0]) == pytest.approx(2**24 / 16e9 / 1.1e-3)


def test_weights_in_the_cache_are_not_limited_by_memory(results: Results) -> None:
    record = dataclasses.replace(results.records[0], case={"k": 384, "n": 384, "m": 1})
    assert analysis.limit_seconds(record, record.results[0]) is None
    record.case["m"] = 512
    expected = 2 * 512 * 384 * 384 / 800e9
    assert analysis.limit_seconds(record, record.results[0]) == pytest.approx(expected)


def test_a_convolution_is_limited_by_its_multiplications() -> None:
    dense, depthwise = convolution(CONVS[0]), convolution(CONVS[8])
    expected = CONVS[0].operations / 800e9 / 1e-3
    assert analysis.share(dense, dense.results[0]) == pytest.approx(expected)
    assert analysis.share(depthwise, depthwise.results[0]) is None


def test_the_mean_over_convolutions_needs_all_of_them(results: Results) -> None:
    def found(text: str) -> str:
        return next((x for x in markdown(results).splitlines() if x.startswith(f"| {text}")), "")

    results.records = [convolution(c) for c in CONVS[:-1]]
    assert not found("convolutions, int8 in and out") and not found("the same with batch 8")
    # Twice as fast nine times, half as fast once: 2 ** 0.8 in the geometric mean.
    results.records.append(convolution(CONVS[-1], peer=0.5e-3))
    mean = found("convolutions, int8 in and out: ≥ 1.2× the better engine of torch.ao")
    assert "**met** 1/1" in mean and f"{2**0.8:.2f} ×" in mean
    batch = found("the same with batch 8: ≥ 1×")
    assert "**short** 0/1" in batch and "0.50 ×" in batch


def test_targets_of_resnet_50(results: Results) -> None:
    record = Record("cnn resnet-50", "cnn", {"model": "resnet-50", "batch": 1}, "avx512", 2)
    quality = {"cosine": 0.999, "cosine_min": 0.99}
    record.results = [
        result("W8A8 lowered", "8 bits", True, 10e-3, sqnr=30.5, extra=quality),
        result("openvino static int8", "8 bits", False, 8e-3, sqnr=28.0, extra=quality),
        result("onnxruntime static int8", "8 bits", False, 12e-3, sqnr=28.0, extra=quality),
    ]
    results.records = [record]
    page = markdown(results)
    assert "| ResNet-50, static int8: ≥ 1× OpenVINO | **short** 0/1 | 0.80 × |" in page
    assert "| ResNet-50, static int8: SQNR ≥ onnxruntime's | **met** 1/1 | 30.50 dB |" in page
    assert "| resnet-50, batch 1 | **W8A8 lowered** | 10.00 |" in page


def test_no_limit_without_a_measurement(results: Results) -> None:
    record = dataclasses.replace(results.records[0], limits={})
    assert analysis.share(record, record.results[0]) is None


def test_peers_have_as_many_bits(results: Results) -> None:
    record = results.records[0]
    peers = analysis.peers_of(record, record.results[0])
    assert [p.name for p in peers] == ["torch.ao x86", "torch int8pack bf16"]
    best = analysis.fastest(peers)
    assert best is not None and best.name == "torch.ao x86"


def test_the_page_holds_times_ratios_and_shares(results: Results) -> None:
    page = markdown(results)
    line = next(x for x in page.splitlines() if x.startswith("| **W8A8**"))
    assert line == "| **W8A8** | 1100 ±110 | 20000 ±2000 |"
    assert "| · best peer | 2.00× torch.ao x86 | 1.05× torch.ao x86 |" in page
    assert "| · torch float | 4.00× | 4.50× |" in page
    assert "| · of the limit | 95% | 107% |" in page
    assert "At most 3 minor page faults in a call (torch fp32)." in page
    assert "| read memory | 10.0 | 16.0 | GB/s |" in page
    assert "| openvino | not installed |" in page
    assert "numpy" not in page


def test_the_page_says_what_other_work_disturbed(results: Results) -> None:
    assert "waited for a core" not in markdown(results)
    results.records[0].results[1].waited = 0.3
    page = markdown(results)
    assert "- 1 of 8 results waited for a core for more than 5% of their time, torch.ao x86" in page
    assert "for 30%" in page


def test_targets_say_met_and_short(results: Results) -> None:
    page = markdown(results)
    met = next(x for x in page.splitlines() if x.startswith("| W8A8 at M=1: ≥ 1.1×"))
    assert "**met** 1/1" in met and "2.00 ×" in met and "torch.ao x86" in met
    for record in results.records:
        record.results[0].median *= 2
    short = next(x for x in markdown(results).splitlines() if x.startswith("| W8A8 at M=1: ≥ 1.1×"))
    assert "**short** 0/1" in short and "1.00 ×" in short


def test_an_outcome_knows_its_direction() -> None:
    assert Outcome("", "", 1.1, 1.0).met and not Outcome("", "", 1.1, 1.0, at_most=True).met
    assert Outcome("", "", 0.5, 1.0).margin == pytest.approx(0.5)
    assert Outcome("", "", 2.0, 1.0, at_most=True).margin == pytest.approx(0.5)


def test_targets_of_what_was_not_measured_are_left_out(results: Results) -> None:
    results.records.clear()
    assert not any(list(target.find(results)) for target in TARGETS)
    assert "## Targets" not in markdown(results)


def test_compare_shows_what_moved(results: Results, slower: Results) -> None:
    text = comparison(results, slower)
    assert "2 results in both, 2 moved" in text
    assert (
        "| 4096x4096 M=1, avx512 | W8A8 | 1100 | 1650 | 1.50 | 2.00× → 1.33× | 95% → 64% |" in text
    )


def test_compare_is_silent_about_noise(results: Results) -> None:
    assert "0 moved" in comparison(results, results)


def test_compare_names_other_versions(results: Results, slower: Results) -> None:
    slower.about["versions"] = {"torch": "2.14.0"}
    assert "torch (2.13.0 → 2.14.0)" in comparison(results, slower)


def test_markdown_tables_escape_their_bars() -> None:
    assert table(["a"], [["x|y"]]).splitlines()[-1] == "| x\\|y |"


@pytest.mark.parametrize(("seconds", "text"), [(1.26e-6, "1.3"), (99e-6, "99.0"), (0.5, "500000")])
def test_microseconds(seconds: float, text: str) -> None:
    assert microseconds(seconds) == text
