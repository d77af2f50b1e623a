"""The command line: every command, and a sentence instead of a traceback."""

import json
import sys

import pytest
import rich.console
import torch
from torch import nn

import qkernels as qk
from qkernels.cli import main
from qkernels.commands import parse_scheme, read_lines

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

WORDS = "a small model reads short lines of text and tells what it saw in them".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny BERT as `save_pretrained` leaves it, with its tokenizer."""
    path = tmp_path_factory.mktemp("tiny-bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS) + 5, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(path)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    transformers.BertTokenizer.from_pretrained(path).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def quantized(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("out") / "tiny-w8a8.safetensors"
    assert main(["quantize", str(folder), "--scheme", "w8a8", "--out", str(path)]) == 0
    return path


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("\n\n".join(" ".join(WORDS[i : i + 5]) for i in range(9)))
    return path


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_quantize_writes_a_file_that_can_be_rebuilt(quantized, folder):
    header = qk.io.read_header(quantized)
    assert header.metadata["transformers_config"]["hidden_size"] == 32
    config = transformers.BertConfig.from_dict(header.metadata["transformers_config"])
    model = transformers.BertForSequenceClassification(config).eval()
    qk.load_model(model, quantized)
    ids = torch.tensor([[2, 5, 6, 3]])
    reference = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        close = torch.cosine_similarity(
            model(ids).logits.flatten(), reference(ids).logits.flatten(), dim=0
        )
    assert close > 0.99


def test_quantize_says_what_it_did(capsys, folder, tmp_path):
    out = tmp_path / "m.safetensors"
    code, said, _ = run(
        capsys, "quantize", folder, "--scheme", "W4A16", "--group-size", 16, "--out", out,
        "--ignore", "classifier", "pooler",
    )  # fmt: skip
    assert code == 0
    assert "W4A16(group_size=16)" in said
    assert "ignored by 'classifier'" in said
    assert str(out) in said
    assert "bert.pooler.dense" not in qk.io.read_header(out).modules


def test_search_quantize_compare(capsys, folder, lines, tmp_path):
    plan, out, html = tmp_path / "plan.json", tmp_path / "mixed.safetensors", tmp_path / "r.html"
    code, said, _ = run(
        capsys, "search", folder, "--text", lines, "--budget", "sqnr=24", "--objective", "size",
        "--out", plan, "--checkpoint", tmp_path / "state.json", "--seconds", 0.1,
    )  # fmt: skip
    assert code == 0
    assert "least size with SQNR ≥ 24.0 dB" in said
    found = qk.PrecisionPlan.load_json(plan)
    code, said, _ = run(capsys, "quantize", folder, "--plan", plan, "--out", out)
    assert code == 0
    header = qk.io.read_header(out)
    assert {name: m.scheme for name, m in header.modules.items()} == {
        name: scheme for name, scheme in found.schemes.items() if scheme is not None
    }
    code, said, _ = run(
        capsys, "compare", folder, out, "--text", lines, "--plan", plan, "--html", html
    )
    assert code == 0
    assert "the plan, measured" in said
    assert "The search that the model comes from" in html.read_text()


def test_inspect(capsys, quantized):
    code, said, _ = run(capsys, "inspect", quantized)
    assert code == 0
    assert "BertForSequenceClassification" in said
    assert "bert.encoder.layer.0.intermediate.dense" in said
    assert "64 × 32" in said
    assert "W8A8()" in said


def test_inspect_as_json_counts_all_bytes(capsys, quantized):
    code, said, _ = run(capsys, "inspect", quantized, "--json")
    assert code == 0
    facts = json.loads(said)
    entry = facts["modules"]["bert.encoder.layer.0.intermediate.dense"]
    assert entry["bytes"] == 64 * 32 + 64 * 4 + 64 * 4
    assert entry["scheme"]["scheme"] == "W8A8"
    assert facts["bytes"] == facts["other_bytes"] + sum(
        m["bytes"] for m in facts["modules"].values()
    )
    assert facts["metadata"]["transformers_config"]["model_type"] == "bert"


def test_inspect_does_not_load_tensors(capsys, quantized, monkeypatch):
    def refuse(*_):
        raise AssertionError("a tensor was created")

    monkeypatch.setattr(qk, "load_model", refuse)
    monkeypatch.setattr(torch, "frombuffer", refuse)
    assert run(capsys, "inspect", quantized)[0] == 0


def test_inspect_of_a_model_of_ones_own(capsys, tmp_path):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    model[1].weight = nn.Parameter(model[0].weight[:4].detach().clone())
    qk.quantize_(model, qk.NF4(group_size=16), ignore="1")
    qk.save_model(model, tmp_path / "own.safetensors")
    code, said, _ = run(capsys, "inspect", tmp_path / "own.safetensors")
    assert code == 0
    assert "1 quantized modules" in said
    assert "NF4(group_size=16)" in said


def test_compare_prints_and_writes_the_report(capsys, folder, quantized, lines, tmp_path):
    html, data = tmp_path / "r.html", tmp_path / "r.json"
    code, said, _ = run(
        capsys, "compare", folder, quantized, "--text", lines, "--html", html, "--json", data,
        "--batch-size", 4, "--max-length", 16,
    )  # fmt: skip
    assert code == 0
    facts = json.loads(data.read_text())
    assert (facts["batches"], facts["rows"], facts["output"]) == (3, 9, "logits")
    assert facts["cosine_mean"] > 0.99
    assert facts["agreement"] is not None
    assert (facts["model"], facts["reference"]) == ("tiny-w8a8", "float32")
    assert "tiny-w8a8" in said
    assert html.read_text().startswith("<!doctype html>")


def test_compare_reads_no_more_lines_than_asked(lines):
    assert len(read_lines(str(lines), 4)) == 4
    assert len(read_lines(str(lines), 400)) == 9


@pytest.mark.parametrize("name", ["w8a8", "W8A16", "w4a16", "w4a8", "nf4"])
def test_schemes_by_name(name):
    scheme = parse_scheme(name, 32)
    assert type(scheme).__name__ == name.upper()
    assert scheme.group_size == 32


def error(capsys, *arguments):
    """The one sentence on stderr."""
    code, said, err = run(capsys, *arguments)
    assert code == 2
    assert err.startswith("qkernels: ")
    assert err.count("\n") == 1
    assert "Traceback" not in said + err
    return err


def test_errors_are_one_sentence(capsys, folder, quantized, lines, tmp_path):
    out = tmp_path / "out.safetensors"
    quantize = ("quantize", folder, "--out", out, "--scheme")
    compare = ("compare", folder, quantized, "--text")
    assert "there is no scheme 'w3a3'; choose one of W8A8" in error(capsys, *quantize, "w3a3")
    assert "group_size is 0" in error(capsys, *quantize, "w4a16", "--group-size", 0)
    assert "matches no module" in error(capsys, *quantize, "w4a16", "--ignore", "nothing")
    assert "does not exist" in error(
        capsys, "quantize", folder, "--scheme", "w8a8", "--out", tmp_path / "no" / "x.safetensors"
    )
    assert "it is a folder" in error(
        capsys, "quantize", folder, "--scheme", "w8a8", "--out", tmp_path
    )
    assert "config.json" in error(capsys, "quantize", tmp_path, "--scheme", "w8a8", "--out", out)
    assert "cannot be read" in error(capsys, "inspect", tmp_path / "missing.safetensors")
    assert "not a safetensors file" in error(capsys, "inspect", lines)
    assert "qkernels metadata" in error(capsys, "inspect", folder / "model.safetensors")
    missing = tmp_path / "missing.txt"
    assert f"'{missing}': No such file or directory" in error(capsys, *compare, missing)
    assert "not UTF-8" in error(capsys, *compare, quantized)
    assert "--batch-size is 0" in error(capsys, *compare, lines, "--batch-size", 0)
    search = ("search", folder, "--text", lines, "--out", tmp_path / "p.json", "--budget")
    assert "--budget fast is no limit; write it as sqnr=30" in error(capsys, *search, "fast")
    assert "budget names 'speed'" in error(capsys, *search, "speed=2")
    planned = ("quantize", folder, "--out", out, "--plan", lines)
    assert "lines.txt: " in error(capsys, *planned)
    assert "--group-size goes with --scheme" in error(capsys, *planned, "--group-size", 8)
    (tmp_path / "empty.txt").write_text("\n \n")
    assert "no line with text" in error(capsys, *compare, tmp_path / "empty.txt")
    assert not out.exists()


def test_a_folder_without_permission_is_refused_before_the_work(
    capsys, folder, lines, monkeypatch, tmp_path
):
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != str(tmp_path))
    monkeypatch.setattr("qkernels.commands.load_folder", lambda _: pytest.fail("loaded the model"))
    out = tmp_path / "out"
    assert "no permission" in error(capsys, "quantize", folder, "--scheme", "w8a8", "--out", out)
    search = ("search", folder, "--text", lines, "--budget", "sqnr=24", "--out", out)
    assert "no permission" in error(capsys, *search)


def test_tables_have_names_in_full(capsys):
    """In a narrow terminal too: patterns are written from them."""
    layer = "a_long_name_of_which_nothing_may_be_left_out"
    model = nn.ModuleDict({layer: nn.Sequential(nn.Linear(64, 64))})
    summary = qk.quantize_(model, qk.W8A8())
    rich.console.Console(width=60).print(summary)
    said = capsys.readouterr().out
    first = "".join(line.strip("│┃ ").split("│")[0].strip() for line in said.splitlines())
    assert f"{layer}.0" in first


def test_folders_with_foreign_or_broken_configs(capsys, tmp_path):
    config = tmp_path / "config.json"
    arguments = ("quantize", tmp_path, "--scheme", "w8a8", "--out", tmp_path / "x.safetensors")
    config.write_text('{"architectures": ["os.system", "BertConfig"], "auto_map": {}}')
    assert "models with code of their own are not loaded" in error(capsys, *arguments)
    config.write_text("{")
    assert "not a readable JSON file" in error(capsys, *arguments)
    config.write_text("[]")
    assert "holds a list" in error(capsys, *arguments)
    config.write_text('{"architectures": ["BertModel"], "model_type": "bert"}')
    assert "qkernels: " in error(capsys, *arguments)  # transformers says which weights it misses


def test_a_model_of_another_architecture(capsys, folder, lines, tmp_path):
    other = nn.Sequential(nn.Linear(4, 4))
    qk.quantize_(other, qk.W8A8())
    qk.save_model(other, tmp_path / "other.safetensors")
    arguments = ("compare", folder, tmp_path / "other.safetensors", "--text", lines)
    assert "load it into the model it was saved from" in error(capsys, *arguments)


def test_missing_transformers_names_the_extra(capsys, folder, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    said = error(
        capsys, "quantize", folder, "--scheme", "w8a8", "--out", tmp_path / "x.safetensors"
    )
    assert "pip install 'qkernels[hf]'" in said


def test_traceback_on_request():
    with pytest.raises(ValueError, match="cannot be read"):
        main(["inspect", "missing.safetensors", "--traceback"])


@pytest.mark.parametrize("arguments", [[], ["bench-press"], ["inspect"], ["quantize", "x"]])
def test_wrong_usage_exits_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: qkernels" in capsys.readouterr().err


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    said = capsys.readouterr().out
    for command in ("doctor", "demo", "quantize", "inspect", "compare"):
        assert command in said


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"qkernels {qk.__version__}\n"


@pytest.mark.parametrize("command", "doctor demo search quantize inspect compare bench".split())
def test_help_says_what_a_command_does(capsys, command):
    with pytest.raises(SystemExit):
        main(["--help"])
    overview = " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        main([command, "--help"])
    sentence = capsys.readouterr().out.split("\n\n")[1]
    assert sentence.endswith(".")
    purpose = " ".join(sentence.split())[1:-1]
    assert f"{command} {sentence[0].lower()}{purpose}" in overview
