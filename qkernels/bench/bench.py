"""What every group of cases needs: the peers, the choice of cases, the machine's limits."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from qkernels import _C
from qkernels.bench.limits import Machine
from qkernels.bench.measure import Effort, Measured, measure
from qkernels.bench.peers import Peers
from qkernels.bench.plan import Only
from qkernels.bench.results import Record, Result

Engine = TypeVar("Engine")
# A unit: what its records are filed under, and what measures them. A run can stop after any unit.
Unit = tuple[str, Callable[[], list[Record]]]


@dataclass
class Bench:
    """One run of the suite.

    Args:
        only: which cases.
        effort: how long to measure each.
        peers: the peers of this environment.
        machine: measures limits; None without a compiler.
        quick: whether to leave out what takes long.
        say: prints a line for the user.
        skipped: contender → why it was left out; filled while running.
    """

    only: Only
    effort: Effort
    peers: Peers
    machine: Machine | None
    quick: bool
    say: Callable[[str], None]
    skipped: dict[str, str] = field(default_factory=dict)

    def chosen(self, engines: Iterable[Engine]) -> list[Engine]:
        """Those engines that `--only` and `--quick` leave; compiling takes minutes."""
        return [
            e
            for e in engines
            if self.only.engine(e.name, e.own)  # type: ignore[attr-defined]
            and not (self.quick and e.name.endswith("compiled"))  # type: ignore[attr-defined]
        ]

    def skip(self, name: str, where: str, error: Exception) -> None:
        """Leave a contender, or a whole unit, out of `where`, and say why once."""
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
        key = name if name == where else f"{name}, {where}"
        if key not in self.skipped:
            self.say(f"  {key} is left out: {reason}")
        self.skipped.setdefault(key, reason)

    def record(self, unit: str, group: str, case: Mapping[str, Any]) -> Record:
        """A record without results yet."""
        return Record(unit, group, dict(case), _C.isa(), torch.get_num_threads())

    def compare(
        self,
        record: Record,
        contenders: Mapping[str, Callable[[], object]],
        describe: Mapping[str, Mapping[str, Any]],
        limits: Iterable[str] = ("read",),
    ) -> Record:
        """Time contenders against each other and fill the record.

        Args:
            record: the case.
            contenders: name → timed call.
            describe: name → further fields of its `Result`, at least `kind` and `own`.
            limits: what to sample in the same rounds: "read", "copy", or an arithmetic.
        """
        if not contenders:
            raise RuntimeError("no contender is left")
        rates: dict[str, list[float]] = {}
        sampled = self._samplers(limits)

        def sample() -> None:
            for name, rate in sampled.items():
                rates.setdefault(name, []).append(rate())

        kinds = {name: str(describe[name]["kind"]) for name in contenders}
        found = measure(contenders, self.effort, kinds=kinds, each_round=sample)
        record.limits = {name: statistics.median(values) for name, values in rates.items()}
        record.results = [self._result(name, found[name], describe[name]) for name in contenders]
        self.say(_line(record))
        return record

    def _samplers(self, limits: Iterable[str]) -> dict[str, Callable[[], float]]:
        machine = self.machine
        if machine is None:
            return {}
        samplers: dict[str, Callable[[], float]] = {}
        for name in limits:
            if name == "read":
                samplers[name] = machine.read
            elif name == "copy":
                samplers[name] = machine.copy
            elif (peak := machine.peak_for(name)) is not None:
                # The system may start the first pair of threads on one core.
                samplers[name] = lambda peak=peak: max(machine.peak(peak) for _ in range(3))  # type: ignore[misc]
        return samplers

    @staticmethod
    def _result(name: str, measured: Measured, fields: Mapping[str, Any]) -> Result:
        return Result.of(name, measured=measured, **fields)


def _line(record: Record) -> str:
    case = " ".join(f"{key}={value}" for key, value in record.case.items())
    own = [r for r in record.results if r.own]
    others = [r for r in record.results if not r.own]

    def best(results: list[Result]) -> str:
        if not results:
            return "nothing"
        fastest = min(results, key=lambda r: r.median)
        return f"{fastest.name} {fastest.median * 1e6:.0f} µs"

    return f"  {record.group} {case}: {best(own)}; peers: {best(others)}"
