"""What the steps of scripts/gpu_check.sh found: `python scripts/gpu_check_report.py OUTDIR`.

OUTDIR has steps.tsv (name, exit status and seconds of each step) and a log of each; check.md and
check.json are written there, and what failed is printed.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from qkernels.bench.cuda import facts

# Steps about the kernel that has to be asked for: that it may still is no failure.
ASKED = "grouped_wgmma_"
WORDS = {
    5: "no test has such a name",
    9: "the sanitizer found something",
    124: "it took too long",
    127: "there is no such program",
    137: "it took too long",
}
# Lines that sum a log up: pytest's and the sanitizer's.
SUMS = re.compile(r"\d+ (?:passed|failed|errors?|skipped|deselected)\b.* in [\d.]+s|\w+ SUMMARY: ")
# Lines that say what is wrong: tests that failed, and why; what the sanitizer reports; a compiler.
FAULTS = re.compile(
    r"(?:FAILED|ERROR) \S|E   \S|=+ .*(?:hazard|[Ii]nvalid|[Dd]ivergent|[Ee]rror)\b|.*\berror: \S"
)
FAULT_LINES = 12


@dataclass(frozen=True)
class Step:
    """A step that has run.

    Args:
        step: its name.
        status: of its command.
        seconds: that it took.
        sums: the lines of its log that sum it up.
        faults: if it failed, the first lines that say why; the last ones where none does.
    """

    step: str
    status: int
    seconds: int
    sums: tuple[str, ...]
    faults: tuple[str, ...]

    @property
    def word(self) -> str:
        """The result in words."""
        if self.status == 0:
            return "passed"
        return f"failed ({self.status}{', ' * (self.status in WORDS)}{WORDS.get(self.status, '')})"


def read_step(line: str, folder: Path) -> Step:
    """A line of steps.tsv with what its log says."""
    name, status, seconds = line.split("\t")
    log = (folder / f"{name}.log").read_text(errors="replace").splitlines()
    lines = [text.strip() for text in log if text.strip()]
    sums = [text.strip("= ") for text in lines if SUMS.search(text)]
    faults = [t for t in lines if FAULTS.match(t) and not SUMS.search(t)]
    # The names of tests come last in a log.
    faults.sort(key=lambda text: not text.startswith(("FAILED", "ERROR")))
    shown = () if status == "0" else tuple((faults or lines[-FAULT_LINES:])[:FAULT_LINES])
    return Step(name, int(status), int(seconds), tuple(sums or lines[-1:]), shown)


def all_ran(step: Step) -> bool:
    """Whether a step of pytest has run tests, and skipped none."""
    text = "; ".join(step.sums)
    return re.search(r"\b\d+ passed", text) is not None and "skipped" not in text


def verdict(steps: Sequence[Step]) -> str:
    """Whether the kernel that QKERNELS_GROUPED_WGMMA=1 asks for may become the default."""
    asked = [s for s in steps if s.step.startswith(ASKED)]
    bad = [f"{s.step} {s.word}" for s in asked if s.status != 0]
    bad += [f"{s.step} left tests out" for s in asked if s.status == 0 and not all_ran(s)]
    if not asked:
        return "QKERNELS_GROUPED_WGMMA=1: not tried, for which a GPU of sm_90a is needed"
    if bad:
        return f"QKERNELS_GROUPED_WGMMA=1: has to be asked for still; {'; '.join(bad)}"
    return "QKERNELS_GROUPED_WGMMA=1: cleared; it may become the default"


def markdown(steps: Sequence[Step], told: dict[str, str]) -> str:
    """check.md."""
    lines = ["# GPU check", "", *(f"- {key}: {value}" for key, value in told.items())]
    lines += [f"- {verdict(steps)}", "", "| step | result | seconds | in short |"]
    lines += ["| --- | --- | --- | --- |"]
    for s in steps:
        lines.append(f"| {s.step} | {s.word} | {s.seconds} | {'; '.join(s.sums)[:160]} |")
    for s in steps:
        if s.status != 0:
            lines += ["", f"## {s.step}", "", "```text", *(f[:200] for f in s.faults), "```"]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Write both files; 0 if all steps passed but those that the verdict is about."""
    (folder,) = map(Path, arguments)
    listed = folder / "steps.tsv"
    steps = [read_step(line, folder) for line in listed.read_text().splitlines()]
    told = facts()
    found = {"facts": told, "verdict": verdict(steps), "steps": [asdict(s) for s in steps]}
    (folder / "check.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "check.md").write_text(markdown(steps, told))
    listed.unlink()
    failed = [s for s in steps if s.status != 0]
    for s in failed:
        print(f"gpu_check: {s.step} {s.word}; {folder / s.step}.log says:")
        print(*(f"  {line[:200]}" for line in s.faults), sep="\n")
    print(f"gpu_check: {verdict(steps)}")
    return int(not steps or any(not s.step.startswith(ASKED) for s in failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
