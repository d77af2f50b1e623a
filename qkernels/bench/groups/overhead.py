"""What a call costs beside its arithmetic: layers so small that nothing else is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from qkernels.bench import own
from qkernels.bench.bench import Bench, Unit
from qkernels.bench.results import Record
from qkernels.nn import QLinear

# One block of 16 outputs: some nanoseconds of arithmetic.
_FEATURES = 16


def units(bench: Bench) -> Iterator[Unit]:
    yield "overhead", lambda: _overhead(bench)


def _overhead(bench: Bench) -> list[Record]:
    """The layer, the op below it, and the cheapest op of torch that makes a tensor."""
    layer = nn.Linear(_FEATURES, _FEATURES)
    x = torch.randn(1, _FEATURES)
    contenders: dict[str, Callable[[], object]] = {
        "torch bare op": x.clone,
        "torch fp32": lambda: layer(x),
    }
    for name, scheme in own.SCHEMES.items():
        quantized = QLinear.from_float(layer, scheme).eval()
        contenders[f"{name} layer"] = lambda q=quantized: q(x)  # type: ignore[misc]
        sizes = (scheme.layout, _FEATURES, _FEATURES, scheme.group_size)
        contenders[f"{name} op"] = lambda q=quantized, sizes=sizes, code=scheme.activation_code: (  # type: ignore[misc]
            torch.ops.qkernels.linear(x, q.packed, q.bias, None, None, None, None, *sizes, code, 0)
        )
    describe: dict[str, dict[str, Any]] = {
        name: {"kind": name, "own": not name.startswith("torch")} for name in contenders
    }
    record = bench.record("overhead", "overhead", {"k": _FEATURES, "n": _FEATURES, "m": 1})
    with torch.inference_mode():
        return [bench.compare(record, contenders, describe, ())]
