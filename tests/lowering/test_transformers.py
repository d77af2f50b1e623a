"""CNNs of the transformers library, from small configurations."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

import qkernels as qk

RESNET = transformers.ResNetConfig(
    embedding_size=16, hidden_sizes=[32, 64], depths=[1, 2], num_labels=7
)
MOBILENET = transformers.MobileNetV2Config(image_size=64, depth_multiplier=0.35, num_labels=7)


@pytest.mark.parametrize(
    "kind, config",
    [
        (transformers.ResNetForImageClassification, RESNET),
        (transformers.MobileNetV2ForImageClassification, MOBILENET),
    ],
)
def test_all_of_it_is_int8(kind, config, tmp_path):
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for (
            module
        ) in model.modules():  # as they come, MobileNetV2's weights drown in BatchNorm's eps
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
        for _ in range(8):
            model(torch.randn(8, 3, 64, 64))
    model.eval()
    batches = [{"pixel_values": torch.randn(8, 3, 64, 64), "labels": None} for _ in range(2)]
    x = batches[0]["pixel_values"]
    made = qk.lower(model, {"pixel_values": x}, batches=batches, observer="minmax")
    assert not made.summary.left
    got = made(pixel_values=x[:3])
    with torch.no_grad():
        expected = model(pixel_values=x[:3]).logits
    assert type(got).__name__ == "ImageClassifierOutputWithNoAttention"
    noise = (expected - got.logits).square().sum()
    assert 10 * math.log10(expected.square().sum() / noise) > 20
    qk.save_model(made, tmp_path / "model.safetensors")
    loaded = qk.load_lowered(tmp_path / "model.safetensors")
    assert torch.equal(loaded(pixel_values=x[:3]).logits, got.logits)
