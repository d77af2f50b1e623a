"""Per-layer comparison by forward hooks on the modules that two models share by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.functional import EPILOGUE_FUNCTIONS
from qkernels.nn.module import QModule
from qkernels.report.accumulate import Noise
from qkernels.report.outliers import channel_amax
from qkernels.report.outputs import Tokens, to_device, without_padding


@dataclass
class LayerRecord:
    """What is accumulated for one layer: inside its model, and on the reference's own input."""

    name: str
    calls: int = 0
    total: Noise = field(default_factory=Noise)
    own: Noise | None = None
    channel_amax: Tensor | None = None  # of the reference's input


class LayerProbe:
    """Compares the outputs of matching layers, batch by batch.

    Layers are the reference's modules without children that have parameters; the module of the
    same name in the model is the counterpart. The outputs of one batch at a time are held between
    the run of the reference and the run of the model.

    Args:
        model: the model under test.
        reference: the model it is compared with.
        is_quantized: says which modules of `model` also run on the reference's input, which
            separates a layer's own error from what it inherits.
    """

    def __init__(self, model: nn.Module, reference: nn.Module, is_quantized: Any) -> None:
        counterparts = dict(model.named_modules())
        leaves = {
            name: module
            for name, module in reference.named_modules()
            if name and not any(module.children()) and any(True for _ in module.parameters())
        }
        self.reference_layers = {n: m for n, m in leaves.items() if n in counterparts}
        self.model_layers = {n: counterparts[n] for n in self.reference_layers}
        self.unmatched = tuple(n for n in leaves if n not in counterparts)
        self.records: dict[str, LayerRecord] = {}  # in the order of first execution
        self._is_quantized = is_quantized
        self._held: dict[str, list[Tensor]] = {}
        self._tokens: Tokens | None = None
        self._busy = False  # the probe itself runs a layer, which the two models may share

    @contextmanager
    def on_reference(self, tokens: Tokens | None) -> Iterator[None]:
        """Hold what every layer of the reference answers in the enclosed run."""
        self._tokens = tokens
        self._held = {}
        with _hooks(self.reference_layers, self._from_reference):
            yield

    @contextmanager
    def on_model(self, tokens: Tokens | None) -> Iterator[None]:
        """Compare every layer of the model with what is held; hold nothing afterwards."""
        self._tokens = tokens
        try:
            with _hooks(self.model_layers, self._from_model):
                yield
        finally:
            self._held = {}

    def _from_reference(self, name: str, args: Any, kwargs: Any, output: Any) -> None:
        tensor = _floating(output)
        if tensor is None or self._busy:
            return
        layer = self.model_layers[name]
        record = self.records.setdefault(name, LayerRecord(name))
        # A clone, because a module behind (ReLU(inplace=True)) may overwrite the output.
        held = without_padding(tensor.detach(), self._tokens).clone()
        if layer_epilogue(self.reference_layers[name]) == "none":
            held = EPILOGUE_FUNCTIONS[layer_epilogue(layer)](held)
        self._held.setdefault(name, []).append(held)
        self._look_at_input(record, args, kwargs)
        if self._is_quantized(layer):
            device = next(layer.parameters()).device
            self._busy = True
            try:
                own = _floating(layer(*to_device(args, device), **to_device(kwargs, device)))
            finally:
                self._busy = False
            if own is not None:
                record.own = record.own or Noise()
                _add(name, record.own, without_padding(own, self._tokens), held)

    def _look_at_input(self, record: LayerRecord, args: Any, kwargs: Any) -> None:
        x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        layer = self.reference_layers[record.name]
        if x is not None and isinstance(layer, nn.Linear):
            x = without_padding(x, self._tokens)
        amax = None if x is None else channel_amax(layer, x)
        if amax is not None and record.channel_amax is not None:
            same = amax.shape == record.channel_amax.shape
            amax = torch.maximum(amax, record.channel_amax) if same else None
        record.channel_amax = amax if amax is not None else record.channel_amax

    def _from_model(self, name: str, args: Any, kwargs: Any, output: Any) -> None:
        tensor, held = _floating(output), self._held.get(name)
        if tensor is None or not held:
            return
        record = self.records[name]
        record.calls += 1
        _add(name, record.total, without_padding(tensor, self._tokens), held.pop(0))


@contextmanager
def ending_alike(pairs: Iterable[tuple[nn.Module, nn.Module]]) -> Iterator[None]:
    """Let layers end where others do, so that they can stand in for them.

    Args:
        pairs: a layer, and one whose activation function is taken off for a while if the first one
            has none.
    """
    changed = [
        (layer, layer.epilogue)
        for other, layer in pairs
        if isinstance(layer, QModule) and layer_epilogue(other) == "none" != layer.epilogue
    ]
    for layer, _ in changed:
        layer.epilogue = "none"
    try:
        yield
    finally:
        for layer, epilogue in changed:
            layer.epilogue = epilogue


def layer_epilogue(layer: nn.Module) -> str:
    """The activation function that a layer's output is behind already, a key of `EPILOGUES`."""
    return layer.epilogue if isinstance(layer, QModule) else "none"


def _add(name: str, noise: Noise, output: Tensor, reference: Tensor) -> None:
    if output.shape != reference.shape:
        raise ValueError(
            f"compare: layer '{name}' returns shape {tuple(output.shape)} in the model but "
            f"{tuple(reference.shape)} in the reference; the two must be the same architecture, or "
            f"pass per_layer=False to compare their outputs alone"
        )
    noise.add(output, reference)


def _floating(output: Any) -> Tensor | None:
    """A layer's output tensor, the first one of a tuple (recurrent layers, attention)."""
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) and output.is_floating_point() else None


@contextmanager
def _hooks(layers: dict[str, nn.Module], report: Any) -> Iterator[None]:
    def hook_for(name: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            report(name, args, kwargs, output)

        return hook

    handles = [
        module.register_forward_hook(hook_for(name), with_kwargs=True)
        for name, module in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
