"""The documents name only what exists: paths, `make` targets, Python names, ops. The guides run."""

import ast
import dataclasses
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import qkernels

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TRACKED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT,
    check=True,
    capture_output=True,
    text=True,
).stdout.splitlines()
SUFFIXES = "py pyi cpp h inl cu cuh toml md txt in html sh yaml cfg".split()

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def code_of(document: Path) -> list[str]:
    """Everything in backticks: the fenced blocks and the inline pieces."""
    text = document.read_text()
    fenced = re.findall(r"^ *```.*?\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    return fenced + re.findall(r"`([^`\n]+)`", rest)


def paths_in(document: Path) -> set[str]:
    """Inline pieces that are one path of this repository, and the targets of relative links."""
    folders = {path.split("/")[0] for path in TRACKED if "/" in path}
    inline = {
        piece
        for piece in code_of(document)
        if re.fullmatch(r"[\w*][\w.*/-]*|\.[\w-]+/[\w.*/-]*", piece)
        and (piece.split("/")[0] in folders if "/" in piece else piece.split(".")[-1] in SUFFIXES)
    }
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", document.read_text())
    return inline | {
        (document.parent / link).resolve().relative_to(ROOT).as_posix() for link in links
    }


def exists(path: str) -> bool:
    """A name without a folder may be that of a file anywhere; `*` is a shell's, NAME any name."""
    pattern = path.rstrip("/").replace("NAME", "*")
    if "/" not in pattern:
        pattern = f"**/{pattern}"
    tracked = set(TRACKED)
    return any(
        found.is_dir() or found.relative_to(ROOT).as_posix() in tracked
        for found in ROOT.glob(pattern)
    )


@each_document
def test_paths_exist(document: Path) -> None:
    missing = sorted(path for path in paths_in(document) if not exists(path))
    assert not missing, f"{document.name} names {missing}"


@each_document
def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        word
        for piece in code_of(document)
        for words in re.findall(r"(?:^|&& *)make((?: +[a-z-]+)+)", piece, re.MULTILINE)
        for word in words.split()
    }
    assert named <= targets


def resolve(name: str) -> None:
    """Looks up a name below `qkernels`, also called `qk`; raises when it leads nowhere."""
    here: Any = qkernels
    for part in name.split(".")[1:]:
        if dataclasses.is_dataclass(here) and part in {f.name for f in dataclasses.fields(here)}:
            return
        if not hasattr(here, part) and inspect.ismodule(here):
            importlib.import_module(f"{here.__name__}.{part}")
        here = getattr(here, part)


@each_document
def test_python_names_exist(document: Path) -> None:
    code = "\n".join(code_of(document))
    names = set(re.findall(r"(?<![\w./-])(?:qk|qkernels)(?:\.[A-Za-z_]\w*)+", code))
    wrong = []
    for name in sorted(names):
        # A file such as qkernels.html is no Python name.
        if name.split(".")[-1] in SUFFIXES:
            continue
        try:
            resolve(name)
        except (AttributeError, ImportError):
            wrong.append(name)
    assert not wrong, f"{document.name} names {wrong}"


@each_document
def test_ops_exist(document: Path) -> None:
    named = re.findall(r"torch\.ops\.qkernels\.(\w+)", "\n".join(code_of(document)))
    missing = sorted(op for op in set(named) if not hasattr(torch.ops.qkernels, op))
    assert not missing, f"{document.name} names {missing}"


def python_blocks(document: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


@each_document
def test_python_blocks_parse(document: Path) -> None:
    for block in python_blocks(document):
        ast.parse(block)


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "docs/CALIBRATION.md",
        "docs/LOWERING.md",
        "docs/MIGRATING.md",
        "docs/MIXED_PRECISION.md",
        "docs/QAT.md",
        "docs/TRANSFER.md",
    ],
)
def test_guides_run(document: str, tmp_path: Path) -> None:
    """Their Python blocks, one after the other, as a reader would type them."""
    blocks = python_blocks(ROOT / document)
    assert blocks
    script = tmp_path / "guide.py"
    script.write_text("\n".join(blocks))
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(
    ("name", "found"),
    [("qkernels.quantize", True), ("qk.W8A8.group_size", True), ("qkernels.never_was", False)],
)
def test_resolve(name: str, found: bool) -> None:
    if found:
        resolve(name)
    else:
        with pytest.raises(ImportError):
            resolve(name)


def test_public_names_are_there() -> None:
    """`from qkernels import *` must not fail on a name that has gone."""
    assert not [name for name in qkernels.__all__ if not hasattr(qkernels, name)]


def test_readme_quotes_the_committed_demo() -> None:
    """Every row of numbers in the README stands in a result file, and that says where it ran."""
    result = (ROOT / "benchmarks/results/demo.md").read_text()
    facts = json.loads((ROOT / "benchmarks/results/demo.json").read_text())
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if "%" in line]
    quoted = [line for line in rows if line.startswith("|")]
    assert len(quoted) == len(facts["models"])
    assert all(line in result.splitlines() for line in quoted)
    assert facts["machine"]["commit"] in result
