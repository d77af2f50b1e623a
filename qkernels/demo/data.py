"""Text for the demo: docstrings of the installed libraries, or a CSV file of the user's own."""

from __future__ import annotations

import ast
import csv
import importlib.util
import random
import re
import sysconfig
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Label and import name of the libraries that may serve as classes; those that are not installed, or
# have too few docstrings, are left out.
LIBRARIES = {
    "python": "",
    "numpy": "numpy",
    "torch": "torch",
    "scipy": "scipy",
    "scikit-learn": "sklearn",
    "matplotlib": "matplotlib",
    "transformers": "transformers",
    "sympy": "sympy",
    "networkx": "networkx",
    "huggingface-hub": "huggingface_hub",
}
NEUTRAL = "library"
MIN_PER_LIBRARY = 150
MIN_PER_LABEL = 5
MAX_ROWS = 6000

# Folders that hold tests, other libraries' code, or nothing that a reader would call documentation.
_SKIPPED_FOLDERS = frozenset(
    "site-packages dist-packages tests test testing _vendor _vendored_packages externals extern "
    "_lib idlelib lib2to3 ensurepip __pycache__".split()
)
_MAX_PER_MODULE = 12
_MIN_WORDS, _ENOUGH_WORDS, _MAX_CHARS = 10, 20, 300

# Any word with one of these inside names its library; of the aliases, only the whole word does.
_NAMES = "numpy|torch|scipy|sklearn|scikit|matplotlib|pyplot|sympy|networkx|hugging_?face"
_NAMES += "|python"
_ALIASES = "np|npt|sp|plt|mpl|mpl_toolkits|nx|aten|hf|hub|transformers|stdlib|hugging[ -]face"
# The whole dotted path goes with the name: what follows `torch.` tells as much as `torch` does.
GIVE_AWAY = re.compile(
    rf"(?<![a-z0-9])(?:scikit[ -]learn|\w*(?:{_NAMES})\w*|(?:{_ALIASES}|hf_?\w+)(?![a-z0-9]))"
    r"(?:\.\w+)*",
    re.IGNORECASE,
)
_ROLE = re.compile(r":[\w:]+:`~?\.?([^`<]*?)(?:\s*<[^`>]*>)?`")
_SPACE = re.compile(r"\s+")
_URL = re.compile(r"https?://\S+")
_SIGNATURE = re.compile(r"^[\w.]+\(.*\)( *->.*)?$")
# From here on a paragraph is a list of parameters, whose style would tell the library.
_LIST = re.compile(
    r"\b(?:Args|Arguments|Parameters|Attributes|Returns):? |:\w+ ?\w*: |^\w+ \(.*?\): |"
    r"(?:\w+ )?[-=~]{4,}"
)


@dataclass(frozen=True)
class Example:
    """One text with the index of its class, and the module (or CSV row) that it comes from."""

    text: str
    label: int
    source: str


@dataclass(frozen=True)
class Dataset:
    """Three lists of examples; `classes[example.label]` is the name of an example's class."""

    title: str
    classes: list[str]
    train: list[Example]
    val: list[Example]
    test: list[Example]

    def majority(self) -> float:
        """Test accuracy of always answering the commonest class of the training texts."""
        commonest = Counter(e.label for e in self.train).most_common(1)[0][0]
        return sum(e.label == commonest for e in self.test) / len(self.test)


def clean(docstring: str) -> str:
    """First paragraph of a docstring as one line, without the names that give its library away.

    Args:
        docstring: the text as `ast.get_docstring` returns it.

    Returns:
        The cleaned paragraph, or an empty string when it is too short to say anything.

    Example:
        >>> clean("Return an :class:`numpy.ndarray` that holds the mean of each row and column.")
        'Return an library that holds the mean of each row and column.'
    """
    words: list[str] = []
    for paragraph in docstring.split("\n\n"):
        plain = _ROLE.sub(r"\1", _URL.sub("", _SPACE.sub(" ", paragraph).strip()))
        if _SIGNATURE.match(plain):
            continue
        text, *rest = _LIST.split(plain, maxsplit=1)
        words += GIVE_AWAY.sub(NEUTRAL, text.replace("`", "").replace("*", "")).split()
        if rest or len(words) >= _ENOUGH_WORDS:
            break
    text = " ".join(words)
    if len(words) < _MIN_WORDS or not text[0].isalpha() or text.startswith("Copyright"):
        return ""
    return textwrap.shorten(text, _MAX_CHARS, placeholder="")


def docstrings(path: Path) -> Iterator[str]:
    """Docstrings of a source file's module, public classes and functions; the file never runs."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):  # a template, or code for another Python
        return
    nodes: list[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef] = [tree]
    for node in nodes:  # grows while it runs
        text = ast.get_docstring(node)
        if text:
            yield text
        if isinstance(node, ast.Module | ast.ClassDef):
            nodes.extend(
                child
                for child in node.body
                if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                and not child.name.startswith("_")
            )


def source_files(library: str) -> list[Path]:
    """Python files of an installed library (an empty name: the standard library), sorted."""
    if not library:
        root = Path(sysconfig.get_paths()["stdlib"])
    else:
        spec = importlib.util.find_spec(library)
        if spec is None or not spec.submodule_search_locations:
            return []
        root = Path(spec.submodule_search_locations[0])
    files = (p.relative_to(root) for p in root.rglob("*.py"))
    return [root / f for f in sorted(files) if not _SKIPPED_FOLDERS.intersection(f.parts)]


def docstring_dataset(per_library: int, seed: int) -> Dataset:
    """Which installed library does a docstring come from?

    Every module (source file) is in one of the three splits only, and no text occurs twice.

    Args:
        per_library: texts to take from each library, at most.
        seed: chooses the modules and the split; the same seed and installation give the same data.

    Raises:
        ValueError: fewer than two libraries have enough docstrings.

    Example:
        >>> data = docstring_dataset(per_library=150, seed=0)
        >>> len(data.classes) >= 2
        True
    """
    rng = random.Random(seed)
    seen: set[str] = set()
    classes: list[str] = []
    splits: tuple[list[Example], ...] = ([], [], [])
    for name, library in LIBRARIES.items():
        files = source_files(library)
        rng.shuffle(files)
        modules: list[tuple[str, list[str]]] = []
        count = 0
        for path in files:
            texts = _new_texts(path, seen)
            texts = texts[: min(_MAX_PER_MODULE, per_library - count)]
            count += len(texts)
            modules.append((str(path), texts))
            if count == per_library:
                break
        if count < min(MIN_PER_LIBRARY, per_library):
            continue
        label = len(classes)
        classes.append(name)
        done = 0
        for module, texts in modules:  # whole modules: the first to test, then val, then train
            share = done / count
            split = splits[2] if share < 0.2 else splits[1] if share < 0.3 else splits[0]
            split.extend(Example(text, label, module) for text in texts)
            done += len(texts)
    if len(classes) < 2:
        raise ValueError(
            f"found docstrings of {len(classes)} libraries but needs two or more; install "
            "the demo's requirements with `pip install 'qkernels[demo]'` or pass --text FILE.csv."
        )
    for split in splits:
        rng.shuffle(split)
    title = "Which library does a docstring come from?"
    return Dataset(title, classes, *splits)


def _new_texts(path: Path, seen: set[str]) -> list[str]:
    texts = []
    for docstring in docstrings(path):
        text = clean(docstring)
        # Copies often differ in a number or in case only, or go on differently after a while.
        key = re.sub(r"[^a-z]", "", text.lower())[:60]
        if key and key not in seen:
            seen.add(key)
            texts.append(text)
    return texts


def csv_dataset(path: Path, seed: int, max_rows: int = MAX_ROWS) -> Dataset:
    """The user's own texts: a CSV file with the columns `text` and `label`.

    The split is stratified: each label has its share of the training, validation and test texts.

    Args:
        path: a UTF-8 file; other columns are ignored, and so are empty and repeated texts.
        seed: chooses the split.
        max_rows: texts to use, at most, so that the demo ends in minutes.

    Raises:
        ValueError: the file cannot be used; the sentence says why and what to do.
    """
    by_label: dict[str, list[tuple[str, str]]] = {}
    seen: set[str] = set()
    for line, text, label in _read_rows(path):
        if text and label and text not in seen:
            seen.add(text)
            by_label.setdefault(label, []).append((text, f"{path.name}:{line}"))
    if not by_label:
        raise ValueError(
            f"--text {path} has no row with both a text and a label; add rows below the header."
        )
    if len(by_label) == 1:
        raise ValueError(
            f"--text {path} has only the label '{next(iter(by_label))}'; a classifier needs "
            "at least two different labels."
        )
    for label, rows in by_label.items():
        if len(rows) < MIN_PER_LABEL:
            raise ValueError(
                f"label '{label}' in --text {path} has {len(rows)} different texts but the "
                f"split needs {MIN_PER_LABEL} or more; add rows or remove the label."
            )
    rng = random.Random(seed)
    keep = min(1.0, max_rows / len(seen))
    classes = sorted(by_label)
    splits: tuple[list[Example], ...] = ([], [], [])
    for index, label in enumerate(classes):
        rows = by_label[label]
        rng.shuffle(rows)
        rows = rows[: max(MIN_PER_LABEL, int(len(rows) * keep))]
        test, val = max(1, len(rows) // 5), max(1, len(rows) // 10)
        for i, (text, source) in enumerate(rows):
            split = splits[2] if i < test else splits[1] if i < test + val else splits[0]
            split.append(Example(text, index, source))
    for split in splits:
        rng.shuffle(split)
    return Dataset(f"Which label does a text of {path.name} have?", classes, *splits)


def _read_rows(path: Path) -> Iterator[tuple[int, str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames
            if not columns:
                raise ValueError(
                    f"--text {path} is empty; it needs a header line `text,label` and rows."
                )
            missing = [c for c in ("text", "label") if c not in columns]
            if missing:
                raise ValueError(
                    f"--text {path} has no column '{missing[0]}' (its header is "
                    f"{_shown(columns)}); name the columns `text` and `label`, separated by commas."
                )
            for row in reader:
                yield reader.line_num, (row["text"] or "").strip(), (row["label"] or "").strip()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--text {path} is not UTF-8 (byte {error.start} cannot be read); "
            "save it as UTF-8 and try again."
        ) from error
    except csv.Error as error:
        raise ValueError(
            f"--text {path} is not a readable CSV file ({error}); check its quotes."
        ) from error
    except OSError as error:
        raise ValueError(
            f"--text {path} cannot be opened ({error.strerror}); check the path."
        ) from error


def _shown(columns: Sequence[str]) -> str:
    line = ",".join(columns)
    return repr(line if len(line) <= 60 else line[:60] + "…")
