"""Report as text, JSON and HTML."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from qkernels.report import Latency, Layer, Metric, Report, plots, words
from qkernels.report.text import layers_to_show
from qkernels.timing import Timing


def layer(name="encoder.dense", **changes):
    values = {
        "name": name,
        "kind": "QLinear W8A8",
        "quantized": True,
        "calls": 2,
        "sqnr_db": 30.5,
        "own_sqnr_db": 41.0,
        "max_abs_error": 0.25,
        "nonfinite": 0,
        "bytes": 1_000_000,
        "reference_bytes": 4_000_000,
    }
    return Layer(**{**values, **changes})


def report(**changes):
    values = {
        "model": "W8A8",
        "reference": "float32",
        "output": "logits",
        "batches": 4,
        "rows": 500,
        "agreement": 0.992,
        "predictions": 500,
        "cosine_mean": 0.99991,
        "cosine_min": 0.9971,
        "sqnr_db": 34.2,
        "max_abs_error": 0.0321,
        "nonfinite": 0,
        "nonfinite_reference": 0,
        "metric": Metric("accuracy", 0.911, 0.914),
        "layers": (layer("a"), layer("b", own_sqnr_db=12.0), layer("norm", quantized=False,
                   own_sqnr_db=None, sqnr_db=math.inf)),
        "bytes": 3_000_000,
        "reference_bytes": 9_000_000,
        "latency": Latency("32×128", Timing((0.04, 0.05, 0.06)), Timing((0.09, 0.1, 0.12))),
        "machine": {"cpu": "Test CPU", "isa": "avx2"},
        "notes": ("A note.",),
    }  # fmt: skip
    return Report(**{**values, **changes})


class Page(HTMLParser):
    """Checks that tags nest, and collects what a browser would fetch or run."""

    VOID = frozenset({"meta", "path", "use", "br", "wbr", "link"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.external = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "data", "action") and value[:1] != "#":
                self.external.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def save(tmp_path, r):
    r.save_html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text("utf-8")
    return text, Page(text)


def test_page_needs_nothing_else(tmp_path):
    text, page = save(tmp_path, report())
    assert page.external == []
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert not re.search(r"url\((?!#)|@import", text)
    assert page.tags.count("svg") == 3
    assert "prefers-color-scheme: dark" in text
    assert report().verdict in " ".join(page.text)


def test_page_shows_the_numbers(tmp_path):
    _, page = save(tmp_path, report())
    text = " ".join(page.text)
    for shown in ("3.00×", "2.00×", "99.2 %", "0.9999", "34.2 dB", "0.911", "identical", "A note."):
        assert shown in text


def test_names_are_escaped_everywhere(tmp_path):
    evil = '<script>alert("$x^2$")</script>&$notes'
    r = report(
        model=evil,
        reference=f"ref{evil}",
        output=evil,
        metric=Metric(evil, 1.0, 1.0),
        layers=(layer(evil, kind=evil),),
        machine={"cpu": evil},
        notes=(evil,),
    )
    text, page = save(tmp_path, r)
    assert "script" not in page.tags
    assert "<script" not in text
    assert evil in "".join(page.text)
    assert "<script>" in str(r)  # the terminal shows it as it is


def test_rich_markup_in_names_is_text():
    assert "[red]layer[/]" in str(report(layers=(layer("[red]layer[/]"),), notes=("[x]",)))


def test_without_matplotlib_the_page_says_what_gives_plots(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "available", lambda: False)
    text, page = save(tmp_path, report())
    assert "svg" not in page.tags
    assert "pip install qkernels[plot]" in text
    assert page.tags.count("table") == 2


def test_bare_report(tmp_path):
    bare = report(
        agreement=None,
        predictions=0,
        cosine_mean=None,
        cosine_min=None,
        sqnr_db=None,
        metric=None,
        layers=(),
        latency=None,
        notes=(),
    )
    _, page = save(tmp_path, bare)
    assert page.tags.count("svg") == 1
    assert "no finite output" in bare.verdict
    assert str(bare)
    assert bare.to_dict()["latency"] is None


@pytest.mark.parametrize("count", [1, 3, 400])
def test_layer_plot_of_any_number_of_layers(tmp_path, count):
    layers = tuple(layer(f"layer.{i}", sqnr_db=math.inf if i % 2 else 20.0) for i in range(count))
    _, page = save(tmp_path, report(layers=layers))
    assert page.tags.count("svg") == 3


@pytest.mark.parametrize("value", [math.inf, -math.inf, None])
def test_layer_plot_without_finite_values(value):
    svg = plots.layer_sqnr(report(layers=(layer(sqnr_db=value, own_sqnr_db=value),)))
    assert (svg is None) == (value is None)


def test_json_round_trip(tmp_path):
    path = tmp_path / "report.json"
    report(sqnr_db=math.inf, cosine_min=math.nan).save_json(path)
    data = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert data["sqnr_db"] == "inf"
    assert data["cosine_min"] == "nan"
    assert data["layers"][2]["sqnr_db"] == "inf"
    assert data["latency"]["speedup"] == 2.0
    assert data["compression"] == 3.0
    assert data["verdict"]


def test_files_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            report().save_html(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="does not exist; create it first"):
        report().save_json(tmp_path / "missing" / "report.json")


def test_text_shows_the_lowest_of_many_layers():
    layers = tuple(layer(str(i), own_sqnr_db=float(100 - i)) for i in range(60))
    assert [n for n, _ in layers_to_show(layers, 3)] == [58, 59, 60]
    assert layers_to_show(layers[:3], 3) == [(1, layers[0]), (2, layers[1]), (3, layers[2])]
    assert "24 of 60" in str(report(layers=layers))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "W8A8 is 3.00× smaller than float32 and 2.00× as fast; "),
        ({"bytes": 9_000_000, "latency": None}, "W8A8 is as large as float32; "),
        ({"bytes": 18_000_000}, "W8A8 is 2.00× larger than float32 "),
        ({"sqnr_db": math.inf}, "its outputs are identical on 500 vectors."),
        ({}, "same prediction in 99.2 % of 500 cases"),
        ({"agreement": None}, "its outputs have cosine 0.9999"),
        ({}, "accuracy goes from 0.914 to 0.911"),
        ({"nonfinite": 7}, "NaN or Inf in 7 of 500 output vectors (0 for float32): do not use"),
    ],
)
def test_verdict(changes, sentence):
    assert sentence in report(**changes).verdict


def test_words():
    assert words.seconds(0.0652) == "65.2 ms"
    assert words.seconds(3e-7) == "300 ns"
    assert words.seconds(0.9999) == "1.00 s"
    assert words.percent(0.99999) == ">99.9 %"
    assert words.percent(1.0) == "100.0 %"
    assert words.cosine(0.9999912) == "0.999991"
    assert words.decibel(None) == "–"
    assert words.times(12.34) == "12.3×"
