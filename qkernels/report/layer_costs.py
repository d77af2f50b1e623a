"""What each layer costs: its time in the model, and what it adds to the output's error."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from qkernels.nn.fastpath import plain_transformer_paths
from qkernels.report.accumulate import Noise
from qkernels.report.outputs import main_output, real_tokens, without_padding
from qkernels.report.trial import LayerClock, standing_in
from qkernels.timing import clock, interleave


def layer_seconds(
    sides: Mapping[str, tuple[Mapping[str, nn.Module], Callable[[], object]]], budget: float
) -> dict[str, dict[str, float]]:
    """Median seconds of every layer of several models, which take turns.

    Args:
        sides: by name of the model, its layers and what runs it.
        budget: seconds to spend.
    """
    samples: dict[str, dict[str, list[float]]] = {side: {} for side in sides}

    def run(side: str) -> None:
        layers, call = sides[side]
        with LayerClock(layers).running() as seconds:
            call()
        for name, value in seconds.items():
            samples[side].setdefault(name, []).append(value)

    interleave({side: lambda s=side: run(s) for side in sides}, budget=budget)  # type: ignore[misc]
    return {
        side: {name: statistics.median(values) for name, values in found.items()}
        for side, found in samples.items()
    }


def error_shares(
    call_reference: Callable[[Any], Any],
    batch: Any,
    pairs: Mapping[str, tuple[nn.Module, nn.Module]],
    budget: float,
) -> dict[str, float] | None:
    """The noise of the output with one layer quantized, over the sum of all such; {} if it is 0.

    Args:
        call_reference: runs the reference.
        batch: what it runs on.
        pairs: by name, a layer of the reference and its quantized counterpart.
        budget: seconds after which None is returned.
    """
    tokens = real_tokens(batch)
    noises: dict[str, float] = {}
    end = clock() + budget
    with plain_transformer_paths():
        expected = without_padding(main_output(call_reference(batch)).tensor, tokens).clone()
        for name, pair in pairs.items():
            if clock() >= end:
                return None
            noise = Noise()
            with standing_in([pair]):
                answer = main_output(call_reference(batch)).tensor
            noise.add(without_padding(answer, tokens), expected)
            noises[name] = noise.noise
    total = sum(noises.values())
    return {name: noise / total for name, noise in noises.items()} if total > 0 else {}
