"""What moved between two results files."""

from __future__ import annotations

from qkernels.bench.analysis import case_name, fastest, peers_of, share
from qkernels.bench.results import Record, Result, Results
from qkernels.bench.table import microseconds, table

# A smaller change is not shown, nor one inside both spreads.
_THRESHOLD = 0.03


def comparison(before: Results, after: Results) -> str:
    """A Markdown page: every own result that moved, the largest loss first.

    Machines drift by tens of percent, so besides the times it shows what was measured against
    something in the same run: the ratio to the best peer, and the share of the limit.

    Args:
        before: a run.
        after: another run.
    """
    old = {record.key: record for record in before.records}
    moved: list[tuple[float, list[str]]] = []
    compared = 0
    for record in after.records:
        earlier = old.get(record.key)
        if earlier is None:
            continue
        for result in record.results:
            was = next((r for r in earlier.results if r.name == result.name), None)
            if was is None or not result.own:
                continue
            compared += 1
            change = result.median / was.median
            spread = (result.iqr + was.iqr) / 2
            if abs(change - 1) > _THRESHOLD and abs(result.median - was.median) > spread:
                moved.append((change, _row(earlier, was, record, result)))
    lines = [
        f"before: {_origin(before)}",
        f"after: {_origin(after)}",
        f"{compared} results in both, {len(moved)} moved by more than {_THRESHOLD:.0%} and more "
        f"than their spread.",
    ]
    differences = _differences(before, after)
    if differences:
        lines.append(f"The runs also differ in {differences}.")
    if moved:
        header = ["case", "contender", "before µs", "after µs", "after/before"]
        header += ["ratio to best peer", "share of the limit"]
        rows = [row for _, row in sorted(moved, key=lambda pair: -pair[0])]
        lines += ["", table(header, rows, left=2)]
    return "\n".join(lines)


def _origin(results: Results) -> str:
    about = results.about
    return f"{about['time']}, commit {about['commit'] or 'unknown'}, {about['machine']['cpu']}"


def _differences(before: Results, after: Results) -> str:
    found = []
    for part in ("machine", "versions", "environment"):
        old, new = before.about[part], after.about[part]
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                found.append(f"{key} ({old.get(key)} → {new.get(key)})")
    return ", ".join(found)


def _row(earlier: Record, was: Result, record: Record, result: Result) -> list[str]:
    return [
        f"{case_name(record)}, {record.isa}",
        result.name,
        microseconds(was.median),
        microseconds(result.median),
        f"{result.median / was.median:.2f}",
        f"{_ratio(earlier, was)} → {_ratio(record, result)}",
        f"{_share(earlier, was)} → {_share(record, result)}",
    ]


def _ratio(record: Record, result: Result) -> str:
    rival = fastest(peers_of(record, result))
    return f"{rival.median / result.median:.2f}×" if rival else "–"


def _share(record: Record, result: Result) -> str:
    found = share(record, result)
    return f"{found:.0%}" if found is not None else "–"
