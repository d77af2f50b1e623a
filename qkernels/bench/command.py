"""`qkernels bench`: arguments, and the way from cases to files."""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qkernels.bench.bench import Bench
    from qkernels.bench.limits import Machine
    from qkernels.bench.results import Results

RESULTS, TABLE = "results.json", "results.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments.

    Args:
        parser: of `qkernels bench`.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_arguments(parser)
        >>> parser.parse_args(["--quick"]).quick
        True
    """
    parser.add_argument(
        "--quick", action="store_true", help="fewer cases and rounds: under three minutes"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="measure a part: group=linear,quantize,… shape=4096x14336 m=1,16 scheme='W4A8*' "
        "peer='onnxruntime*' model=minilm; a shape K x N of your own works too",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("qkernels-bench"),
        metavar="DIR",
        help="folder for results.json, results.md and the plots (default: qkernels-bench)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in that folder: measure only the units it lacks",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="default: torch's number")
    parser.add_argument("--no-plots", action="store_true", help="write no plots")
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A.json", "B.json"),
        help="measure nothing; show what moved from one results file to the other",
    )
    parser.add_argument(
        "--render",
        action="store_true",
        help="measure nothing; write table and plots of the results in the folder anew",
    )


def run(options: argparse.Namespace) -> int:
    """Measure, or compare two results files.

    Args:
        options: as `add_arguments` declares them.

    Returns:
        The exit code.

    Raises:
        ValueError: `--only` or a file is not understood.
    """
    from qkernels.bench.results import Results

    if options.compare:
        from qkernels.bench.compare import comparison

        before, after = (Results.load(path) for path in options.compare)
        print(comparison(before, after))
        return 0
    if options.render:
        write(Results.load(options.output / RESULTS), options.output, plots=not options.no_plots)
        return 0
    return _measure(options)


def _measure(options: argparse.Namespace) -> int:
    import torch

    from qkernels.bench.bench import Bench
    from qkernels.bench.measure import FULL, QUICK, keep_freed_memory
    from qkernels.bench.peers import load_peers
    from qkernels.bench.plan import Only
    from qkernels.bench.results import Results, about

    only = Only.parse(options.only)
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads: got {options.threads}; expected at least 1")
        torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    keep_freed_memory()
    peers = load_peers()
    for name, reason in peers.skipped.items():
        _say(f"{name} is left out: {reason}")
    described = {"quick": options.quick, "only": options.only}
    results = Results(about(peers.versions(), described), skipped=dict(peers.skipped))
    path = options.output / RESULTS
    if options.resume and path.exists():
        results = _resumed(Results.load(path), results)
    machine = _machine(results)
    effort = QUICK if options.quick else FULL
    bench = Bench(only, effort, peers, machine, options.quick, _say)
    _run_units(bench, results, path)
    write(results, options.output, plots=not options.no_plots)
    _say(f"Wrote {options.output / TABLE}")
    return 0


def _resumed(before: Results, now: Results) -> Results:
    for what in ("machine", "versions", "build", "commit", "environment"):
        if before.about[what] != now.about[what]:
            raise ValueError(
                f"--resume: the earlier part of the run had another {what}; start a run in another "
                f"folder with --output"
            )
    return before


def _machine(results: Results) -> Machine | None:
    """The machine, surveyed unless the run that is resumed has done it; None without a compiler."""
    import torch

    from qkernels.bench.limits import Machine, NoCompilerError

    try:
        machine = Machine(torch.get_num_threads())
    except NoCompilerError as error:
        results.skipped["limits"] = str(error)
        _say(str(error))
        return None
    if not results.limits:
        _say("Measuring the machine")
        for limit in machine.survey():
            results.limits.setdefault(limit.name, {})[str(limit.threads)] = limit.rate
    return machine


def _run_units(bench: Bench, results: Results, path: Path) -> None:
    from qkernels.bench.groups import UNITS

    units = [unit for group in bench.only.groups(list(UNITS)) for unit in UNITS[group](bench)]
    for number, (name, measure) in enumerate(units, start=1):
        if name in results.done:
            _say(f"[{number}/{len(units)}] {name}: done before")
            continue
        _say(f"[{number}/{len(units)}] {name}")
        start = time.perf_counter()
        try:
            records = measure()
        except Exception as error:
            # One unit that fails must not cost the hour that the others took.
            bench.skip(name, name, error)
        else:
            results.add(name, records)
        results.skipped.update(bench.skipped)
        results.save(path)
        _say(f"  {time.perf_counter() - start:.0f} s")


def write(results: Results, folder: Path, *, plots: bool) -> None:
    """Write the table, and the plots if matplotlib is there.

    Args:
        results: of a run.
        folder: where to.
        plots: whether to draw.
    """
    from qkernels.bench.table import markdown

    (folder / TABLE).write_text(markdown(results))
    if plots:
        try:
            from qkernels.bench.plots import draw
        except ImportError as error:
            _say(f"No plots: {error}; pip install 'qkernels[plot]'")
        else:
            draw(results, folder)


def _say(line: str) -> None:
    print(line, flush=True)
