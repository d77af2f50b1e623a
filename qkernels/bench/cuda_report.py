"""The Markdown table of a GPU run, with what was to be reached beside what was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from qkernels.bench import cuda_crossover as crossover
from qkernels.bench.cuda import Row, copy_rate

_BF16 = "matmul bf16"
_FLOAT_4 = ("W4A16 g128", "NF4 g64")


@dataclass(frozen=True)
class Target:
    """What is to be reached in the cases that it applies to.

    Args:
        text: in words.
        goal: the least value.
        value: of a row, given the copy rate; None where the target does not apply.
    """

    text: str
    goal: float
    value: Callable[[Row, float], float | None]


def _codec(row: Row, copy: float) -> float | None:
    return row.bytes / row.seconds / copy if row.group == "codec" else None


def _few(smallest: float, largest: float) -> Callable[[Row, float], float | None]:
    """Share of the copy rate at which up to eight rows read weights of so many bytes."""

    def value(row: Row, copy: float) -> float | None:
        if row.group != "linear" or _rows(row) > 8 or not smallest <= row.bytes < largest:
            return None
        return row.bytes / row.seconds / copy

    return value


def _versus(
    peer: str, names: tuple[str, ...], fits: Callable[[int], bool]
) -> Callable[[Row, float], float | None]:
    def value(row: Row, copy: float) -> float | None:
        wanted = row.group == "linear" and row.name in names and fits(_rows(row))
        return row.versus.get(peer) if wanted else None

    return value


def _tops(row: Row, copy: float) -> float | None:
    if row.group != "linear" or row.name != "W8A8" or _rows(row) < 1024:
        return None
    return row.operations / row.seconds / 1e12


def _conv(row: Row, copy: float) -> float | None:
    return next(iter(row.versus.values()), None) if row.group == "conv" else None


_FEW_4 = "4-bit weights, {} rows: × bf16"
TARGETS = (
    Target("quantize, dequantize: share of the copy rate", 0.85, _codec),
    Target("1 … 8 rows, weights of 32 … 64 MB: share of the copy rate", 0.55, _few(32e6, 64e6)),
    Target("1 … 8 rows, weights from 64 MB on: share of the copy rate", 0.70, _few(64e6, 1e12)),
    Target(_FEW_4.format("16"), 2.5, _versus(_BF16, _FLOAT_4, lambda m: m == 16)),
    Target(_FEW_4.format("64"), 1.8, _versus(_BF16, _FLOAT_4, lambda m: m == 64)),
    Target(_FEW_4.format("512 and more"), 0.95, _versus(_BF16, _FLOAT_4, lambda m: m >= 512)),
    Target("W8A8, from 1024 rows on: Top/s", 1300, _tops),
    Target("W8A8: × torch._int_mm", 1.0, _versus("torch._int_mm", ("W8A8",), lambda m: m > 16)),
    Target("int8 convolution: × bf16 channels-last", 1.5, _conv),
)  # fmt: skip


def _rows(row: Row) -> int:
    return int(row.case.split()[0])


def report(rows: Sequence[Row], facts: Mapping[str, str], left_out: Mapping[str, int]) -> str:
    """The text.

    Args:
        rows: what was measured.
        facts: on what.
        left_out: who is missing and why → in how many cases.
    """
    copy = copy_rate(rows)
    lines = ["# CUDA kernels", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    lines += [f"- copy rate: {copy / 1e12:.2f} TB/s, bytes read and written", ""]
    lines += ["## Targets", "", "| target | goal | met | measured, worst to best |"]
    lines += ["| --- | --- | --- | --- |", *(_target(target, rows, copy) for target in TARGETS)]
    both = [(r.case, r.name, r.seconds) for r in rows if r.group == crossover.GROUP]
    rest = [r for r in rows if r.group != crossover.GROUP]
    lines += ["", "## Times", "", *_times(rest, copy)]
    if both:
        lines += ["", "## Kernel, or dequantize and matmul", "", *crossover.table(both)]
    if left_out:
        lines += ["", "## Left out", ""]
        lines += [f"- {who} ({count} cases)" for who, count in left_out.items()]
    return "\n".join(lines) + "\n"


def _target(target: Target, rows: Sequence[Row], copy: float) -> str:
    values = sorted(v for row in rows if row.own and (v := target.value(row, copy)) is not None)
    if not values:
        return f"| {target.text} | ≥ {target.goal:g} | not measured | – |"
    met = sum(value >= target.goal for value in values)
    spread = f"{values[0]:.2f} … {values[-1]:.2f}"
    return f"| {target.text} | ≥ {target.goal:g} | {met} of {len(values)} | {spread} |"


def _times(rows: Sequence[Row], copy: float) -> Iterator[str]:
    yield "| case | contender | µs | share of copy rate | Top/s | × bf16 |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in rows:
        share = f"{row.bytes / row.seconds / copy:.0%}" if row.bytes else ""
        tops = f"{row.operations / row.seconds / 1e12:.1f}" if row.operations else ""
        versus = next((v for k, v in row.versus.items() if "bf16" in k), None)
        times = "" if versus is None else f"{versus:.2f}"
        case = f"{row.group} {row.case}"
        yield f"| {case} | {row.name} | {row.seconds * 1e6:.1f} | {share} | {tops} | {times} |"
