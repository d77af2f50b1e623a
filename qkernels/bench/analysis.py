"""What a result means: rates, shares of the machine's limits, ratios to the peers."""

from __future__ import annotations

from qkernels.bench.plan import Conv, Shape
from qkernels.bench.results import Record, Result

# Groups whose cases are products of x [m, k] with a weight [n, k].
PRODUCTS = ("linear", "capped", "backward", "int_mm")


def operations(record: Record) -> float:
    """Multiplications and additions of a product or a convolution; 0 for other cases."""
    if record.group == "conv":
        return Conv(**record.case).operations
    if record.group not in PRODUCTS:
        return 0.0
    return 2.0 * float(record.case["m"] * record.case["k"] * record.case["n"])


def traffic(record: Record, result: Result) -> float:
    """Bytes that a case cannot do without: a product's weights, a codec's input and output."""
    if record.group in PRODUCTS:
        return float(record.case["k"] * record.case["n"] * result.bits / 8)
    return float(record.case.get("bytes", 0))


def limit_seconds(record: Record, result: Result) -> float | None:
    """The shortest time that the machine's limits, sampled in the same rounds, allow.

    A product takes at least as long as reading its weights and as its multiplications (the
    roofline model, Williams et al., 2009), a convolution as long as its multiplications; a codec as
    long as copying as many bytes.
    """
    if record.group == "quantize":
        copy = record.limits.get("copy")
        return traffic(record, result) / copy if copy else None
    read, peak = record.limits.get("read"), record.limits.get(result.arithmetic)
    if record.group == "conv":
        # Everything comes from a cache. The instructions multiply several channels of an output,
        # and a depthwise convolution has one.
        conv = Conv(**record.case)
        return conv.operations / peak if peak and conv.groups < conv.channels else None
    if record.group not in PRODUCTS or not read or not peak:
        return None
    reading, multiplying = traffic(record, result) / read, operations(record) / peak
    if reading > multiplying and not Shape(record.case["k"], record.case["n"]).rotated:
        return None  # the weights come from a cache, and how fast that is was not measured
    return max(reading, multiplying)


def share(record: Record, result: Result) -> float | None:
    """How much of the machine's limit a result reaches, or None where no limit is known."""
    limit = limit_seconds(record, result)
    return limit / result.median if limit else None


def peers_of(record: Record, result: Result) -> list[Result]:
    """The others that solve the same task with as many bits."""
    return [r for r in record.results if not r.own and r.kind == result.kind]


def fastest(results: list[Result]) -> Result | None:
    return min(results, key=lambda r: r.median, default=None)


def named(record: Record, name: str) -> Result | None:
    """The result of one contender, if it took part."""
    return next((r for r in record.results if r.name == name), None)


def float_twin(record: Record, result: Result) -> Result | None:
    """torch's own product with the type of activations that this contender takes."""
    dtype = "bf16" if result.name.endswith("bf16") or record.group == "backward" else "fp32"
    return named(record, f"torch {dtype}")


def case_name(record: Record) -> str:
    """The case in a few characters, without what is derived.

    Example:
        >>> case_name(Record("u", "linear", {"k": 8, "n": 4, "m": 1}, "", 1))
        '8x4 M=1'
    """
    case = record.case
    if record.group in PRODUCTS or record.group == "overhead":
        return f"{case['k']}x{case['n']} M={case['m']}"
    if record.group == "quantize":
        return f"{case['task']} {case['rows']}x{case['k']}"
    if record.group == "conv":
        return str(Conv(**case))
    if record.group == "cnn":
        return f"{case['model']}, batch {case['batch']}"
    if record.group == "models":
        steps = " per token" if "steps" in case else ""
        return f"{case['model']} {case['batch']}x{case['tokens']}{steps}"
    return " ".join(f"{key}={value}" for key, value in case.items())


def seconds_of_one(record: Record, result: Result) -> float:
    """The median, of one step where a call makes several."""
    return result.median / float(record.case.get("steps", 1))
