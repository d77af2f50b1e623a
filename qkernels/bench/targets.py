"""What qkernels sets out to reach, and whether a run reached it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qkernels.bench.analysis import (
    case_name,
    fastest,
    float_twin,
    named,
    operations,
    peers_of,
    share,
)
from qkernels.bench.plan import CONVS, Conv, Shape
from qkernels.bench.results import Record, Result, Results

Value = Callable[[Record, Result], "float | None"]


@dataclass(frozen=True)
class Outcome:
    """One measured value beside what it should be.

    Args:
        case: where it was measured.
        contender: whose value it is.
        value: measured.
        goal: `value` should be at least this, or at most if `at_most`.
        at_most: see `goal`.
        versus: the peer that it was compared with.
    """

    case: str
    contender: str
    value: float
    goal: float
    at_most: bool = False
    versus: str = ""

    @property
    def met(self) -> bool:
        return self.value <= self.goal if self.at_most else self.value >= self.goal

    @property
    def margin(self) -> float:
        """1 when just met, less when it falls short."""
        if self.at_most:
            return self.goal / self.value if self.value > 0 else 1.0
        return self.value / self.goal


@dataclass(frozen=True)
class Target:
    """A goal for some contenders in some cases.

    Args:
        text: the goal in words.
        unit: of the values: "×", "%", "Gop/s", "µs", "ms" …
        find: gives the outcomes of a run.
    """

    text: str
    unit: str
    find: Callable[[Results], Iterator[Outcome]]


def _each(
    group: str,
    contenders: tuple[str, ...],
    value: Value,
    goal: float,
    *,
    m: tuple[int, ...] | None = None,
    large: bool | None = None,
    at_most: bool = False,
    isa: str = "",
    against: Value | None = None,
) -> Callable[[Results], Iterator[Outcome]]:
    """Outcomes of every matching product; `large` picks language models' shapes or the others."""

    def find(results: Results) -> Iterator[Outcome]:
        for record in _records(results, group, isa):
            case = record.case
            if m is not None and case["m"] not in m:
                continue
            if large is not None and Shape(case["k"], case["n"]).rotated != large:
                continue
            for name in contenders:
                result = named(record, name)
                found = value(record, result) if result else None
                if result is not None and found is not None:
                    rival = fastest(peers_of(record, result)) if value is _best_peer else None
                    versus = rival.name if rival else ""
                    yield Outcome(case_name(record), name, found, goal, at_most, versus)

    return find


def _records(results: Results, group: str, isa: str = "") -> Iterator[Record]:
    return (r for r in results.records if r.group == group and (not isa or isa in r.isa))


# ---- Values --------------------------------------------------------------------------------------


def _best_peer(record: Record, result: Result) -> float | None:
    rival = fastest(peers_of(record, result))
    return rival.median / result.median if rival else None


def _torch_twin(record: Record, result: Result) -> float | None:
    twin = float_twin(record, result)
    return twin.median / result.median if twin else None


def _fp32(record: Record, result: Result) -> float | None:
    twin = named(record, "torch fp32")
    return twin.median / result.median if twin else None


def _torch_ao(record: Record, result: Result) -> float | None:
    rival = _rival_ao(record)
    return rival.median / result.median if rival else None


def _rival_ao(record: Record) -> Result | None:
    engines = [r for r in record.results if r.name.startswith("torch.ao ") and r.kind == "8 bits"]
    return fastest(engines)


def _gops(record: Record, result: Result) -> float:
    return operations(record) / result.median / 1e9


def _percent_of_limit(record: Record, result: Result) -> float | None:
    found = share(record, result)
    return None if found is None else 100 * found


def _few_rows(results: Results) -> Iterator[Outcome]:
    """M = 2…4 against M = 1 of the same shape."""
    single = {
        (r.case["k"], r.case["n"]): r for r in _records(results, "linear") if r.case["m"] == 1
    }
    for record in _records(results, "linear"):
        base = single.get((record.case["k"], record.case["n"]))
        if base is None or record.case["m"] not in (2, 4) or record.case["k"] < 2048:
            continue
        for name in ("W8A8", "W4A8 g128"):
            first, few = named(base, name), named(record, name)
            if first and few:
                yield Outcome(case_name(record), name, few.median / first.median, 1.15, True)


def _conv_ratios(results: Results) -> dict[Conv, float]:
    found = {}
    for record in _records(results, "conv"):
        own, rival = named(record, "W8A8"), _rival_ao(record)
        if own and rival:
            found[Conv(**record.case)] = rival.median / own.median
    return found


def _conv_mean(results: Results) -> Iterator[Outcome]:
    """The geometric mean over all of `CONVS`; that of some of them would mean something else."""
    ratios = _conv_ratios(results)
    if ratios.keys() >= set(CONVS):
        mean = math.exp(math.fsum(math.log(ratios[c]) for c in CONVS) / len(CONVS))
        yield Outcome("geometric mean", "W8A8", mean, 1.2, versus="torch.ao")


def _conv_batch(results: Results) -> Iterator[Outcome]:
    for conv, ratio in _conv_ratios(results).items():
        if conv.batch > 1:
            yield Outcome(str(conv), "W8A8", ratio, 1.0, versus="torch.ao")


def _overhead(results: Results) -> Iterator[Outcome]:
    for record in _records(results, "overhead"):
        bare = named(record, "torch bare op")
        for result in record.results:
            if bare and result.name.endswith(" layer"):
                microseconds = (result.median - bare.median) * 1e6
                yield Outcome(case_name(record), result.name, microseconds, 5.0, True)


def _codecs(tasks: tuple[str, ...], goal: float) -> Callable[[Results], Iterator[Outcome]]:
    def find(results: Results) -> Iterator[Outcome]:
        for record in _records(results, "quantize"):
            result = named(record, "qkernels out=")
            found = share(record, result) if result else None
            if record.case["task"] in tasks and record.case["rows"] > 1 and found is not None:
                yield Outcome(case_name(record), "qkernels out=", 100 * found, goal)

    return find


def _minilm(
    contenders: tuple[str, ...], limits: dict[int, float]
) -> Callable[[Results], Iterator[Outcome]]:
    """Milliseconds by batch, as a multiple of what fp32 torch takes in the same run."""

    def find(results: Results) -> Iterator[Outcome]:
        for record in _records(results, "models"):
            reference = named(record, "torch fp32")
            if record.case["model"] != "minilm" or reference is None:
                continue
            results_there = [r for name in contenders if (r := named(record, name))]
            best = fastest(results_there)
            if best:
                speedup = reference.median / best.median
                goal = limits[record.case["batch"]]
                yield Outcome(case_name(record), best.name, speedup, goal, versus="torch fp32")

    return find


def _minilm_cosine(contender: str, goal: float) -> Callable[[Results], Iterator[Outcome]]:
    def find(results: Results) -> Iterator[Outcome]:
        for record in _records(results, "models"):
            result = named(record, contender)
            if record.case["model"] == "minilm" and record.case["batch"] == 1 and result:
                yield Outcome("minilm", contender, result.extra["cosine"], goal)

    return find


def _resnet_50(
    rival: str, value: Callable[[Result, Result], tuple[float, float]]
) -> Callable[[Results], Iterator[Outcome]]:
    """`value` makes what should be reached, and the goal, of our result and the rival's."""

    def find(results: Results) -> Iterator[Outcome]:
        for record in _records(results, "cnn"):
            own, other = named(record, "W8A8 lowered"), named(record, rival)
            if record.case["model"] == "resnet-50" and own and other:
                yield Outcome(case_name(record), own.name, *value(own, other), versus=rival)

    return find


def _memory(results: Results) -> Iterator[Outcome]:
    for record in _records(results, "memory"):
        for r in record.results:
            if r.own:
                ratio = r.extra["resident"] / r.extra["stored"]
                yield Outcome("resident", r.name, ratio, 1.05, True)


def _memory_peak(results: Results) -> Iterator[Outcome]:
    for record in _records(results, "memory"):
        for r in record.results:
            if r.own:
                layers = r.extra["peak"] / r.extra["layer"]
                yield Outcome("peak while quantizing", r.name, layers, 1.0, True)


# ---- The list ------------------------------------------------------------------------------------

_INTEGER_4 = ("W4A8 g128",)
_FLOAT_4_BF16 = ("W4A16 g128 bf16", "NF4 g64 bf16")
_FLOAT_BF16 = (*_FLOAT_4_BF16, "W8A16 bf16")
_FLOAT_FP32 = ("W4A16 g128 fp32", "NF4 g64 fp32", "W8A16 fp32")
_ALL = ("W8A8", "W4A8 g128", "W4A8 g32", *_FLOAT_BF16, *_FLOAT_FP32)
_ONE = (1,)
_MINILM_EAGER = ("W8A8 fp32", "W8A8 fp32 fused", "W8A8 fp32 fused with attention")
_MINILM_FASTEST = (
    "W8A8 bf16",
    "W8A8 bf16 fused",
    "W8A8 bf16 fused with attention",
    "W8A8 fp32 compiled",
    "W8A8 bf16 compiled",
    "W8A8 fp32 compiled by qkernels",
    "W8A8 bf16 compiled by qkernels",
)

TARGETS: tuple[Target, ...] = (
    Target(
        "W8A8, W4A8 at M=1: ≥ 90 % of the read bandwidth",
        "%",
        _each("linear", ("W8A8", "W4A8 g128"), _percent_of_limit, 90, m=_ONE, large=True),
    ),
    Target(
        "W4A8 at M=1: ≥ 1.5× the best 4-bit peer",
        "×",
        _each("linear", _INTEGER_4, _best_peer, 1.5, m=_ONE, large=True),
    ),
    Target(
        "W8A8 at M=1: ≥ 1.1× the best 8-bit peer",
        "×",
        _each("linear", ("W8A8",), _best_peer, 1.1, m=_ONE, large=True),
    ),
    Target("M = 2…4: ≤ 1.15× the time of M=1", "×", _few_rows),
    Target(
        "W4A8 g128 at M=16: ≥ 1.85× the best 4-bit peer",
        "×",
        _each("linear", _INTEGER_4, _best_peer, 1.85, m=(16,), large=True),
    ),
    Target(
        "W4A8 g128 at M=64, 512: ≥ 2× the best 4-bit peer",
        "×",
        _each("linear", _INTEGER_4, _best_peer, 2.0, m=(64, 512), large=True),
    ),
    Target(
        "W4A8 g128 at M=512: ≥ 85 % of the int8 peak",
        "%",
        _each("linear", _INTEGER_4, _percent_of_limit, 85, m=(512,), large=True),
    ),
    Target(
        "W4A8 g32 at M=512: ≥ 70 % of the int8 peak",
        "%",
        _each("linear", ("W4A8 g32",), _percent_of_limit, 70, m=(512,), large=True),
    ),
    Target(
        "W8A8 at M=16: ≥ 1.15× the best 8-bit peer",
        "×",
        _each("linear", ("W8A8",), _best_peer, 1.15, m=(16,), large=True),
    ),
    Target(
        "W8A8 at M=32, 64: ≥ 1.1× the best 8-bit peer",
        "×",
        _each("linear", ("W8A8",), _best_peer, 1.1, m=(32, 64), large=True),
    ),
    Target(
        "W8A8 from M=128: ≥ 1× the best 8-bit peer",
        "×",
        _each("linear", ("W8A8",), _best_peer, 1.0, m=(128, 256, 512), large=True),
    ),
    Target(
        "W8A8 at M=512: ≥ 93 % of the int8 peak",
        "%",
        _each("linear", ("W8A8",), _percent_of_limit, 93, m=(512,), large=True),
    ),
    Target(
        "4 bits with float activations at M=1: ≥ 80 % of the read bandwidth",
        "%",
        _each("linear", _FLOAT_4_BF16, _percent_of_limit, 80, m=_ONE, large=True),
    ),
    Target(
        "W8A16 at M=1: ≥ 85 % of the read bandwidth",
        "%",
        _each("linear", ("W8A16 bf16",), _percent_of_limit, 85, m=_ONE, large=True),
    ),
    Target(
        "float activations at every M: ≥ 1× torch's nn.Linear of the same type",
        "×",
        _each("linear", _FLOAT_BF16 + _FLOAT_FP32, _torch_twin, 1.0, large=True),
    ),
    Target(
        "small layers at M=1: ≥ 1× torch's fp32 nn.Linear",
        "×",
        _each("linear", _ALL, _fp32, 1.0, m=_ONE, large=False),
    ),
    Target(
        "convolutions, int8 in and out: ≥ 1.2× the better engine of torch.ao, in the mean",
        "×",
        _conv_mean,
    ),
    Target("the same with batch 8: ≥ 1×", "×", _conv_batch),
    Target(
        "ResNet-50, static int8: ≥ 1× OpenVINO",
        "×",
        _resnet_50("openvino static int8", lambda own, other: (other.median / own.median, 1.0)),
    ),
    Target(
        "ResNet-50, static int8: SQNR ≥ onnxruntime's",
        "dB",
        _resnet_50(
            "onnxruntime static int8", lambda own, other: (own.sqnr or 0.0, other.sqnr or 0.0)
        ),
    ),
    Target("a call of a layer: ≤ 5 µs over a bare op", "µs", _overhead),
    Target(
        "backward to the input, M ≥ 64: ≥ 0.9× torch's bf16",
        "×",
        _each("backward", ("W8A16", "W4A16 g128", "NF4 g64"), _torch_twin, 0.9),
    ),
    Target(
        "capped at AVX2, W8A8: ≥ 0.8× torch.ao, which saturates",
        "×",
        _each("capped", ("W8A8",), _torch_ao, 0.8, large=True),
    ),
    Target(
        "capped at AVX2, W4A8 g128 at M=512: ≥ 480 Gop/s",
        "Gop/s",
        _each("capped", _INTEGER_4, _gops, 480, m=(512,), large=True),
    ),
    Target(
        "quantize and dequantize int8: ≥ 90 % of the copy bandwidth",
        "%",
        _codecs(("quantize int8", "dequantize int8"), 90),
    ),
    Target("quantize nf4: ≥ 60 % of the copy bandwidth", "%", _codecs(("quantize nf4",), 60)),
    Target("dequantize nf4: ≥ 80 % of the copy bandwidth", "%", _codecs(("dequantize nf4",), 80)),
    Target("memory: resident ≤ 1.05× the stored bytes", "×", _memory),
    Target("memory: peak ≤ the float model + one layer", "layers", _memory_peak),
    # 13.5 and 582 ms of fp32 torch, against 3.0 and 265 ms, on the machine the goals were set on.
    Target(
        "MiniLM W8A8, fp32 eager: ≥ 4.5× fp32 torch at 1×32, ≥ 2.2× at 32×128",
        "×",
        _minilm(_MINILM_EAGER, {1: 4.5, 32: 2.2}),
    ),
    Target(
        "MiniLM W8A8, bf16 or compiled: ≥ 5.9× fp32 torch at 1×32, ≥ 2.9× at 32×128",
        "×",
        _minilm(_MINILM_FASTEST, {1: 5.9, 32: 2.9}),
    ),
    Target("MiniLM W8A8: cosine ≥ 0.9977", "", _minilm_cosine("W8A8 fp32", 0.9977)),
)
