"""What int4 costs two fine-tuned models, and what training wins back, over several seeds.

    python benchmarks/recovery.py --work FOLDER                      # an hour or more on two cores
    python benchmarks/recovery.py --work FOLDER --only vision        # ten minutes
    python benchmarks/recovery.py --work FOLDER --output benchmarks/results

Every step of a ladder (float, trained on, QAT, LoRA) leaves a file in the work folder, so an
interrupted run goes on where it was. With --output, a table is written from what is there.
Seeds 0 to 2 are those that settings were chosen with, so others are the fairer test.

The float model of a seed is fine-tuned on data drawn by that seed. What follows starts from it and
trains for as many epochs: the float model itself (as a control, for more training alone may help),
the model prepared for quantization (QAT), and adapters on its 4-bit weights (LoRA). Distilled: the
target is what the float model answers, not the labels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from recovery_tasks import TASKS

from qkernels.report.files import write_atomically
from qkernels.report.machine import machine_facts

# What the model of a task does for each step after the first; it may lack one.
METHODS = {
    "float, trained on": "train_on",
    "int4 PTQ": "quantize",
    "int4 QAT": "qat",
    "int4 QAT, distilled": "qat_distilled",
    "int4 LoRA": "lora",
}
STAGES = ("float", *METHODS)


def run_stage(task: str, seed: int, stage: str, work: Path) -> dict[str, Any]:
    """One step of one ladder: its accuracies and what it took; the float model is kept in `work`.

    Args:
        task: a name of TASKS.
        seed: of data and training.
        stage: a name of STAGES.
        work: the folder that holds, or gets, the float model.
    """
    start = time.perf_counter()
    made = TASKS[task](seed)
    file = work / f"{task}-{seed}.pt"
    if stage == "float":
        made.fine_tune()
        torch.save(made.model.state_dict(), file)
    else:
        made.model.load_state_dict(torch.load(file))
        getattr(made, METHODS[stage])()
    val, test = made.accuracies()
    return {"val": val, "test": test, "seconds": time.perf_counter() - start}


def path_of(work: Path, task: str, seed: int, stage: str) -> Path:
    return work / f"{task}-{seed}-{stage.replace(' ', '-').replace(',', '')}.json"


def collect(work: Path, seeds: list[int]) -> dict[str, Any]:
    """Results by task and stage: a row for each seed, and the difference from float in points."""
    found: dict[str, Any] = {}
    for task in TASKS:
        rows: dict[str, Any] = {}
        for stage in STAGES:
            paths = [path_of(work, task, seed, stage) for seed in seeds]
            runs = [json.loads(p.read_text()) if p.exists() else None for p in paths]
            tests = [None if run is None else 100 * run["test"] for run in runs]
            exact = rows["float"]["test"] if rows else tests
            apart = [
                None if a is None or b is None else a - b for a, b in zip(tests, exact, strict=True)
            ]
            there = [value for value in apart if value is not None]
            if there:
                rows[stage] = {
                    "test": tests,
                    "apart": apart,
                    "apart_mean": statistics.fmean(there),
                    "apart_spread": statistics.stdev(there) if len(there) > 1 else None,
                    "runs": runs,
                }
        if rows:
            found[task] = {"title": TASKS[task].title, "rows": rows}
    return found


def markdown(found: dict[str, Any], seeds: list[int], facts: dict[str, str]) -> str:
    lines = ["# int4 after fine-tuning, before and after training", ""]
    lines += [
        f"Test accuracy in percent, seeds {', '.join(map(str, seeds))}. *from float*: the "
        "difference from the float fine-tuned model of the same seed in points, mean ± standard "
        "deviation over the seeds that were run; a dash stands for one that was not.",
    ]
    for entry in found.values():
        lines += ["", f"## {entry['title']}", ""]
        lines += [f"| model | {' | '.join(f'seed {s}' for s in seeds)} | from float |"]
        lines += ["| --- |" + " ---: |" * (len(seeds) + 1)]
        for stage, row in entry["rows"].items():
            each = " | ".join("–" if v is None else f"{v:.1f}" for v in row["test"])
            spread = row["apart_spread"]
            apart = f"{row['apart_mean']:+.2f}" + ("" if spread is None else f" ± {spread:.2f}")
            lines += [f"| {stage} | {each} | {'' if stage == 'float' else apart} |"]
    return "\n".join([*lines, "", *(f"- {key}: {value}" for key, value in facts.items()), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for what is found")
    parser.add_argument("--only", default="", help="steps whose TASK/SEED/STAGE begins like this")
    parser.add_argument("--exact", action="store_true", help="--only is the whole of it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, help="folder for NAME.json and NAME.md")
    parser.add_argument("--name", default="recovery", help="of the files in it")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        for seed in options.seeds:
            for stage in STAGES:
                path = path_of(options.work, task, seed, stage)
                known = stage == "float" or hasattr(TASKS[task], METHODS[stage])
                step = f"{task}/{seed}/{stage}"
                wanted = step == options.only if options.exact else step.startswith(options.only)
                if not known or not wanted or path.exists():
                    continue
                result = run_stage(task, seed, stage, options.work)
                write_atomically(path, json.dumps(result) + "\n")
                print(task, seed, stage, result, file=sys.stderr, flush=True)
    if options.output is not None:
        found, facts = collect(options.work, options.seeds), machine_facts()
        page = markdown(found, options.seeds, facts)
        document = {"seeds": options.seeds, "tasks": found, "machine": facts}
        write_atomically(
            options.output / f"{options.name}.json",
            json.dumps(document, indent=2, ensure_ascii=False) + "\n",
        )
        write_atomically(options.output / f"{options.name}.md", page)
        print(page)


if __name__ == "__main__":
    main()
