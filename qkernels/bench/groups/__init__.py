"""The groups of cases, in the order they run; each module gives its units."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from qkernels.bench.bench import Bench, Unit
from qkernels.bench.groups import capped, cnns, codecs, convs, memory, models, overhead, products

UNITS: dict[str, Callable[[Bench], Iterator[Unit]]] = {
    "linear": products.linear_units,
    "conv": convs.units,
    "overhead": overhead.units,
    "int_mm": products.int_mm_units,
    "backward": products.backward_units,
    "quantize": codecs.units,
    "models": models.units,
    "cnn": cnns.units,
    "memory": memory.units,
    "capped": capped.units,
}
