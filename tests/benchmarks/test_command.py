"""The command, from arguments to files."""

import argparse
from pathlib import Path

import pytest

from qkernels.bench import add_arguments, command
from qkernels.bench import run as run_bench
from qkernels.bench.groups import cnns
from qkernels.bench.limits import NoCompilerError
from qkernels.bench.plan import Conv
from qkernels.bench.results import Record, Results

ONLY = ["--only", "group=linear", "shape=64x32", "m=1,2", "scheme=W8A8", "peer=torch fp32"]


def bench(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run_bench(parser.parse_args(arguments))


@pytest.fixture(autouse=True)
def no_survey(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits have tests of their own."""

    def machine(threads: int) -> None:
        raise NoCompilerError("no compiler in this test")

    monkeypatch.setattr("qkernels.bench.limits.Machine", machine)


def test_a_run_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--quick", *ONLY, "--no-plots", "--output", str(tmp_path)) == 0
    results = Results.load(tmp_path / command.RESULTS)
    assert [r.case["m"] for r in results.records] == [1, 2]
    for record in results.records:
        assert {r.name for r in record.results} == {"W8A8", "torch fp32"}
        assert all(r.samples >= 3 and r.median > 0 for r in record.results)
        assert all(r.sqnr is not None and r.sqnr > 25 for r in record.results)
    assert results.about["machine"]["isa"] == results.records[0].isa
    assert results.skipped["limits"] == "no compiler in this test"
    page = (tmp_path / command.TABLE).read_text()
    assert "### 64 → 32, weights in the cache" in page and "**W8A8**" in page
    assert "linear k=64 n=32 m=1" in capsys.readouterr().out


def test_a_run_of_convolutions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Conv(8, 8, 6, 3)
    monkeypatch.setattr("qkernels.bench.plan.QUICK_CONVS", (small, Conv(8, 8, 6, 1)))
    only = ["--only", "group=conv", "conv=3x3*", "peer=torch.ao onednn,torch fp32"]
    assert bench("--quick", *only, "--no-plots", "--output", str(tmp_path)) == 0
    (record,) = Results.load(tmp_path / command.RESULTS).records
    assert Conv(**record.case) == small
    names = {"W8A8", "W8A8 from float", "torch.ao onednn", "torch fp32"}
    assert {r.name for r in record.results} == names
    page = (tmp_path / command.TABLE).read_text()
    assert "| 3x3 8-8 6x6 |" in page and "× torch.ao onednn" in page


def test_a_run_of_a_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers", reason="classifiers are transformers'")
    config = transformers.ResNetConfig(
        num_labels=7, embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1]
    )
    make = {"small": lambda: transformers.ResNetForImageClassification(config)}
    monkeypatch.setattr(cnns, "_MODELS", make)
    monkeypatch.setattr(cnns, "_SIZE", 64)
    only = ["--only", "group=cnn", "model=small", "peer=torch fp32"]
    assert bench(*only, "--no-plots", "--output", str(tmp_path)) == 0
    records = Results.load(tmp_path / command.RESULTS).records
    assert [r.case for r in records] == [{"model": "small", "batch": n} for n in (1, 8)]
    own = next(r for r in records[0].results if r.own)
    assert own.sqnr is not None and own.sqnr > 20 and own.extra["cosine"] > 0.99
    assert "| small, batch 1 |" in (tmp_path / command.TABLE).read_text()


def test_a_resumed_run_measures_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--quick", *ONLY, "--no-plots", "--output", str(tmp_path), "--resume"]
    assert bench(*arguments) == 0
    before = (tmp_path / command.RESULTS).read_text()
    capsys.readouterr()
    assert bench(*arguments) == 0
    assert "linear 64x32: done before" in capsys.readouterr().out
    assert (tmp_path / command.RESULTS).read_text() == before


def test_a_run_of_other_versions_is_not_resumed(tmp_path: Path, results: Results) -> None:
    results.save(tmp_path / command.RESULTS)
    with pytest.raises(ValueError, match=r"--resume: .*another machine"):
        bench("--quick", *ONLY, "--output", str(tmp_path), "--resume")


def test_a_unit_that_fails_is_reported_and_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> list[Record]:
        raise RuntimeError("out of luck")

    monkeypatch.setattr("qkernels.bench.groups.products._linear", broken)
    assert bench("--quick", *ONLY, "--no-plots", "--output", str(tmp_path)) == 0
    assert "linear 64x32 is left out" in capsys.readouterr().out
    results = Results.load(tmp_path / command.RESULTS)
    assert results.done == [] and "out of luck" in results.skipped["linear 64x32"]


def test_compare_and_render(
    tmp_path: Path, results: Results, slower: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, run in (("a", results), ("b", slower)):
        (tmp_path / name).mkdir()
        run.save(tmp_path / name / command.RESULTS)
    a, b = (str(tmp_path / name / command.RESULTS) for name in "ab")
    assert bench("--compare", a, b) == 0
    assert "2 moved" in capsys.readouterr().out
    assert bench("--render", "--no-plots", "--output", str(tmp_path / "a")) == 0
    assert "**W8A8**" in (tmp_path / "a" / command.TABLE).read_text()


def test_plots(tmp_path: Path, results: Results) -> None:
    pytest.importorskip("matplotlib", reason="plots are an extra")
    for record in results.records:
        record.limits["bf16"] = 400e9
    results.save(tmp_path / command.RESULTS)
    assert bench("--render", "--output", str(tmp_path)) == 0
    for plot in ("ratio.png", "roofline.png"):
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "records": 3}']
)
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"x.json holds no results"):
        bench("--compare", str(path), str(path))


@pytest.mark.parametrize("arguments", [["--threads", "0"], ["--only", "shape=big"]])
def test_bad_arguments(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{arguments[0]}: "):
        bench(*arguments, "--output", str(tmp_path))


def test_results_survive_the_disk(tmp_path: Path, results: Results) -> None:
    results.save(tmp_path / "r.json")
    assert Results.load(tmp_path / "r.json") == results


def test_a_unit_measured_again_replaces_its_records(results: Results, slower: Results) -> None:
    results.add("linear 4096x4096", slower.records)
    assert results.records == slower.records and results.done == ["linear 4096x4096"]
