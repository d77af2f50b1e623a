"""Image classifiers of transformers, quantized statically, with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkernels.bench import own
from qkernels.bench.bench import Bench, Unit
from qkernels.bench.engines import CnnEngine, ModelEngine
from qkernels.bench.groups.models import Subject, Task, measure_subject
from qkernels.bench.results import Record

_SIZE = 224
_HEAD: dict[str, Any] = {"num_labels": 1000}
_BATCHES = (1, 8)
# Images for calibration, in batches of 8; the norms and the measured quality have others.
_CALIBRATION = 16


class Classifier(nn.Module):
    """Images to logits, as every engine wants it.

    Args:
        model: gives an output with `logits`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x).logits
        return logits


def units(bench: Bench) -> Iterator[Unit]:
    for name, make in _MODELS.items():
        if bench.only.has_model(name) and not bench.quick:
            yield f"cnn {name}", lambda name=name, make=make: _cnn(bench, name, make)  # type: ignore[misc]


def images(count: int, seed: int, size: int) -> Tensor:
    """Noise of several scales, float32 [count, 3, size, size]: as images, it is no white noise.

    Args:
        count: images.
        seed: images of different seeds have nothing in common.
        size: height and width.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(count, 3, size, size)
    for scale in (size // 32, size // 8, size // 2):
        noise = torch.randn(count, 3, scale, scale, generator=generator)
        x += F.interpolate(noise, size=(size, size), mode="bilinear")
    return x


# ---- Models --------------------------------------------------------------------------------------


def _resnet_50() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(**_HEAD))


def _mobilenet_v2() -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return MobileNetV2ForImageClassification(MobileNetV2Config(**_HEAD))


def _convnext_tiny() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    # Blocks start as nearly nothing (1e-6), which no trained model's are.
    return ConvNextForImageClassification(ConvNextConfig(layer_scale_init_value=0.2, **_HEAD))


_MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet-50": _resnet_50,
    "mobilenet-v2": _mobilenet_v2,
    "convnext-tiny": _convnext_tiny,
}
# The last norm of each residual block.
_LAST_NORMS = ("layer.2.normalization", "reduce_1x1.normalization")


def settled(model: nn.Module, batch: Tensor) -> nn.Module:
    """The classifier in eval mode, with norms that fit its random weights.

    Residual blocks add a fifth of what they would, as small as training starts them (Goyal et al.,
    2017). Otherwise 50 random layers amplify any rounding until nothing is left of the result.

    Args:
        model: with random weights. It is changed.
        batch: images whose statistics the batch norms take.
    """
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, norm in norms.items():
        norm.momentum = None  # the statistics of all batches alike
        if name.endswith(_LAST_NORMS):
            nn.init.constant_(norm.weight, 0.2)
    if norms:
        with torch.no_grad():
            model.train()(batch)
    return Classifier(model).eval()


# ---- Measuring -----------------------------------------------------------------------------------


def _cnn(bench: Bench, name: str, make: Callable[[], nn.Module]) -> list[Record]:
    def settled_model() -> nn.Module:
        torch.manual_seed(0)
        return settled(make(), images(8, 0, _SIZE))

    calibration = list(images(_CALIBRATION, 1, _SIZE).split(8))
    test = images(max(_BATCHES), 2, _SIZE)
    subject = Subject(
        name,
        settled_model,
        tuple(_task(name, test[:batch]) for batch in _BATCHES),
        lambda model: model(test),
        compiled=True,
    )
    engines = bench.chosen([*own.cnn_engines(), *bench.peers.cnns()])
    converters = [_with_batches(engine, calibration) for engine in engines]
    return measure_subject(bench, "cnn", subject, converters)


def _task(name: str, x: Tensor) -> Task:
    return Task({"model": name, "batch": len(x)}, lambda model: model(x))


def _with_batches(engine: CnnEngine, batches: list[Tensor]) -> ModelEngine:
    def convert(model: nn.Module) -> Any:
        return engine.convert(model, batches)

    return ModelEngine(engine.name, engine.kind, convert, engine.own, engine.compiled)
