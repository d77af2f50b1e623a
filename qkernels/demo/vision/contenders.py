"""The models that the vision demo measures: float32, bfloat16, and int8 and int4 in many ways."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

import qkernels as qk
from qkernels.demo.contenders import IGNORE, REFERENCE
from qkernels.demo.vision.model import ResNet

STATIC = "W8A8 static"
# Dynamic: a scale for each image, found when it comes. Static: scales from calibration.
SCHEMES: dict[str, qk.Scheme | dict[str, qk.Scheme]] = {
    "W8A8 dynamic": qk.W8A8(),
    STATIC: qk.W8A8(static=True),
    "W8A16": qk.W8A16(),
    "W4A16 g32": qk.W4A16(group_size=32),
    "W4A16": qk.W4A16(group_size=-1),
    # Three quarters of the weights are in the last block.
    "mixed": {"*": qk.W8A8(static=True), "blocks.2.conv*": qk.W4A16(group_size=32)},
}


class Bfloat16(nn.Module):
    """A copy of a model in bfloat16 that takes float32 images, as the others do."""

    def __init__(self, model: ResNet) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.model(x.bfloat16())
        return scores


def quantized(
    model: ResNet, scheme: qk.Scheme | Mapping[str, qk.Scheme], batches: Sequence[Tensor]
) -> tuple[ResNet, qk.Summary]:
    """A quantized copy of a model, its batch normalizations folded; the head stays float.

    Args:
        model: the float model, which stays as it is.
        scheme: one, or several by pattern.
        batches: images to calibrate static schemes with.

    Returns:
        The copy, and what became of each of its modules.
    """
    result = copy.deepcopy(model)
    qk.fold_batchnorm_(result)
    schemes = [scheme] if isinstance(scheme, qk.Scheme) else scheme.values()
    calibration = None
    if any(each.static for each in schemes):
        calibration = qk.calibrate(result, batches, observer="mse", progress=False)
    return result, qk.quantize_(result, scheme, ignore=IGNORE, calibration=calibration)


def contenders(
    model: ResNet, batches: Sequence[Tensor]
) -> tuple[dict[str, nn.Module], dict[str, qk.Summary]]:
    """All models by name, the float32 one first, and the summaries of those that are quantized.

    Args:
        model: the fine-tuned float32 model.
        batches: images to calibrate with.
    """
    folded = copy.deepcopy(model)
    qk.fold_batchnorm_(folded)
    found: dict[str, nn.Module] = {REFERENCE: folded, "bfloat16": Bfloat16(folded)}
    summaries = {}
    for name, scheme in SCHEMES.items():
        found[name], summaries[name] = quantized(model, scheme, batches)
    return found, summaries


def images(count: int, size: int) -> dict[str, Tensor]:
    """Keyword arguments of a model to measure latency with: random images.

    Args:
        count: of images.
        size: pixels per side.
    """
    generator = torch.Generator().manual_seed(0)
    return {"x": torch.rand(count, 1, size, size, generator=generator)}
