"""What the commands search, quantize, inspect and compare do."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

import qkernels as qk
from qkernels.hub import load_folder, load_tokenizer, read_config
from qkernels.io import ModelFile, read_header
from qkernels.io.file import open_tensors
from qkernels.nn.module import WEIGHT_KEYS
from qkernels.quantize import DEFAULT_IGNORE
from qkernels.report.files import check_folder
from qkernels.report.modules import label_of
from qkernels.schemes import SCHEMES, Scheme
from qkernels.summary import size_text
from qkernels.terminal import console

# Element sizes by the names that safetensors uses.
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


def quantize_folder(
    folder: str,
    scheme_name: str | None,
    group_size: int | None,
    ignore: Sequence[str] | None,
    out: str,
    plan: str | None = None,
) -> int:
    """Quantize a transformers model and write it as one file, its config in the metadata.

    Args:
        folder: the float model's folder.
        scheme_name: a scheme's name in either case, None if there is a plan.
        group_size: weights per scale, None for the scheme's default.
        ignore: patterns of layers to leave in float, None for the default.
        out: the file to write.
        plan: a file that `search` wrote, in place of the scheme.

    Returns:
        The exit code.
    """
    scheme: Scheme | qk.PrecisionPlan
    if scheme_name is not None:
        scheme = parse_scheme(scheme_name, group_size)
        label = str(scheme)
    elif group_size is not None:
        raise ValueError("--group-size goes with --scheme; a plan has the group size of each layer")
    else:
        assert plan is not None
        scheme, label = qk.PrecisionPlan.load_json(plan), f"quantized as {plan} says"
    source = Path(folder)
    check_folder(out)
    config = read_config(source)
    model = load_folder(source)
    summary = qk.quantize_(model, scheme, DEFAULT_IGNORE if ignore is None else ignore)
    qk.save_model(model, out, {"transformers_config": config, "source": source.resolve().name})
    terminal = console()
    terminal.print(summary)
    terminal.print(
        f"{len(summary.converted)} of {len(summary.rows)} modules are {escape(label)}: "
        f"{size_text(summary.bytes_before)} → {size_text(summary.bytes_after)} in memory. "
        f"{escape(out)} holds {size_text(Path(out).stat().st_size)}.",
        soft_wrap=True,
    )
    return 0


def search_folder(
    folder: str,
    text: str,
    budget: Sequence[str],
    objective: str,
    out: str,
    *,
    batch_size: int,
    max_length: int,
    lines: int,
    seconds: float,
    plot: str | None,
    checkpoint: str | None,
) -> int:
    """Choose a scheme for every layer of a transformers model, on the lines of a text file.

    Args:
        folder: the float model's folder.
        text: a UTF-8 file; every line that is not blank is one input.
        budget: limits such as "sqnr=30".
        objective: what is to be as good as possible.
        out: where to write the plan, as JSON.
        batch_size: lines per batch.
        max_length: tokens per line.
        lines: how many lines to read at most.
        seconds: to spend on timing all schemes, and again on timing the plan.
        plot: where to draw the Pareto fronts, or None.
        checkpoint: where to keep what is measured, or None.

    Returns:
        The exit code.
    """
    _check_counts(batch_size, max_length, lines)
    for path in (out, plot):
        if path is not None:
            check_folder(path)
    inputs, limits = read_lines(text, lines), parse_budget(budget)
    model, tokenizer = load_folder(Path(folder)), load_tokenizer(Path(folder))
    batches = list(_batches(tokenizer, inputs, batch_size, max_length))
    plan = qk.search(
        model, batches, limits, objective, latency_seconds=seconds, checkpoint=checkpoint
    )
    plan.save_json(out)
    console().print(plan)
    print(f"\nThe plan: {out}; qkernels quantize {folder} --plan {out} --out FILE carries it out.")
    if plot is not None:
        plan.plot(plot)
    return 0


def parse_budget(parts: Sequence[str]) -> dict[str, float]:
    """Limits as a user writes them on the command line.

    Args:
        parts: such as "sqnr=30".

    Raises:
        ValueError: something else.

    Example:
        >>> parse_budget(["latency=0.5", "size=0.3"])
        {'latency': 0.5, 'size': 0.3}
    """
    limits = {}
    for part in parts:
        key, _, value = part.partition("=")
        try:
            limits[key] = float(value)
        except ValueError:
            raise ValueError(f"--budget {part} is no limit; write it as sqnr=30") from None
    return limits


def parse_scheme(name: str, group_size: int | None) -> Scheme:
    """The scheme that a user names on the command line.

    Args:
        name: w8a8, w8a16, w4a16, w4a8 or nf4, in either case.
        group_size: weights per scale, None for the scheme's default.

    Raises:
        ValueError: there is no such scheme, or it does not take the group size.

    Example:
        >>> parse_scheme("w4a16", 32)
        W4A16(group_size=32)
    """
    kind = SCHEMES.get(name.upper())
    if kind is None:
        raise ValueError(f"there is no scheme '{name}'; choose one of {', '.join(SCHEMES)}")
    options: dict[str, Any] = {} if group_size is None else {"group_size": group_size}
    return kind(**options)


def inspect_file(path: str, *, as_json: bool) -> int:
    """Print what a model file says about itself; its tensors are not read.

    Args:
        path: a file that `save_model` wrote.
        as_json: print JSON instead of a table.

    Returns:
        The exit code.
    """
    header = read_header(path)
    sizes = _tensor_bytes(header)
    modules = {
        name: sum(size for key, size in sizes.items() if key.rpartition(".")[0] == name)
        for name in header.modules
    }
    rest = sum(sizes.values()) - sum(modules.values())
    config = header.metadata.get("transformers_config")
    architecture = config.get("architectures") if isinstance(config, dict) else None
    if as_json:
        facts = {
            "file": str(header.path),
            "version": header.version,
            "written_by": header.written_by,
            "modules": {
                name: {**entry.to_dict(), "bytes": modules[name]}
                for name, entry in header.modules.items()
            },
            "tied": dict(header.tied),
            "other_bytes": rest,
            "bytes": sum(sizes.values()),
            "metadata": dict(header.metadata),
        }
        print(json.dumps(facts, indent=2))
        return 0
    out = console()
    out.print(
        f"{escape(path)}: {', '.join(architecture) if architecture else 'model'}, "
        f"{size_text(sum(sizes.values()))}, format version {header.version}, written by qkernels "
        f"{escape(header.written_by)}",
        soft_wrap=True,
    )
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("module", overflow="fold")
    table.add_column("scheme", no_wrap=True)
    for heading in ("rows × columns", "bytes", "bits"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, entry in header.modules.items():
        rows, columns = entry.shape
        weight = sum(sizes.get(f"{name}.{key}", 0) for key in WEIGHT_KEYS)
        bits = f"{8 * weight / (rows * columns):.2f}" if weight and rows * columns else "–"
        table.add_row(
            escape(name), str(entry.scheme), f"{rows} × {columns}",
            size_text(modules[name]), bits,
        )  # fmt: skip
    out.print(table)
    out.print(
        f"{len(header.modules)} quantized modules; everything else takes {size_text(rest)}. Bits "
        f"are those of a weight with its share of scales and zero points.",
        soft_wrap=True,
    )
    for alias, stored in header.tied.items():
        out.print(f"{escape(alias)} is {escape(stored)}", style="dim", soft_wrap=True)
    return 0


def compare_with_folder(
    folder: str,
    file: str,
    text: str,
    *,
    batch_size: int,
    max_length: int,
    lines: int,
    html: str | None,
    json: str | None,
    plan: str | None,
) -> int:
    """Compare a quantized file with the float model in a folder, on the lines of a text file.

    Args:
        folder: the float model's folder.
        file: a file that `save_model` wrote.
        text: a UTF-8 file; every line that is not blank is one input.
        batch_size: lines per batch.
        max_length: tokens per line.
        lines: how many lines to read at most.
        html: where to write the report as a page, or None.
        json: where to write the report as JSON, or None.
        plan: a file that `search` wrote, to show its front in the report, or None.

    Returns:
        The exit code.
    """
    _check_counts(batch_size, max_length, lines)
    for path in (html, json):
        if path is not None:
            check_folder(path)
    inputs = read_lines(text, lines)
    header = read_header(file)
    reference, tokenizer = load_folder(Path(folder)), load_tokenizer(Path(folder))
    model = qk.load_model(copy.deepcopy(reference), file)
    report = qk.compare(
        model,
        reference,
        _batches(tokenizer, inputs, batch_size, max_length),
        names=(header.path.stem, label_of(reference)),
        plan=None if plan is None else qk.PrecisionPlan.load_json(plan),
    )
    report.print()
    if html is not None:
        report.save_html(html)
        print(f"\nThe report as a page: {html}")
    if json is not None:
        report.save_json(json)
        print(f"The report as JSON: {json}")
    return 0


def _check_counts(batch_size: int, max_length: int, lines: int) -> None:
    for option, value in (("batch-size", batch_size), ("max-length", max_length), ("lines", lines)):
        if value < 1:
            raise ValueError(f"--{option} is {value}; expected at least 1")


def read_lines(path: str, limit: int) -> list[str]:
    """The first lines of a text file that are not blank.

    Args:
        path: a UTF-8 file.
        limit: how many lines to read at most.

    Raises:
        ValueError: the file is not UTF-8 text or has no such line.
        OSError: it cannot be read.
    """
    found: list[str] = []
    try:
        with Path(path).open(encoding="utf-8") as file:
            for line in file:
                if line.strip():
                    found.append(line.strip())
                if len(found) == limit:
                    break
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is not UTF-8 text: {error}") from None
    if not found:
        raise ValueError(f"'{path}' has no line with text in it; every line is one input")
    return found


def _batches(
    tokenizer: Any, inputs: list[str], size: int, max_length: int
) -> Iterator[dict[str, torch.Tensor]]:
    for start in range(0, len(inputs), size):
        yield dict(
            tokenizer(
                inputs[start : start + size],
                padding=True,
                truncation=True,
                max_length=max_length,
                return_tensors="pt",
            )
        )


def _tensor_bytes(header: ModelFile) -> dict[str, int]:
    """Bytes of every stored tensor, from the file's table of contents."""
    with open_tensors(header.path) as tensors:
        slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
        return {
            key: math.prod(part.get_shape()) * _ITEM_BYTES[part.get_dtype()]
            for key, part in slices.items()
        }
