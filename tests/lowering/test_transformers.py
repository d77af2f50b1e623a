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


# MobileNetV2 has 52 layers of random weights here, which make any noise larger: int8 weights alone
# leave 11 dB. That its ops are the right ones is what the small networks are for.
@pytest.mark.parametrize(
    "kind, config, least",
    [
        (transformers.ResNetForImageClassification, RESNET, 25),
        (transformers.MobileNetV2ForImageClassification, MOBILENET, 4),
    ],
)
def test_all_of_it_is_int8(kind, config, least, tmp_path):
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn(4, 3, 64, 64))
    model.eval()
    x = torch.randn(4, 3, 64, 64)
    batches = [{"pixel_values": x, "labels": None}]
    made = qk.lower(model, {"pixel_values": x}, batches=batches, observer="minmax")
    assert not made.summary.left
    got = made(pixel_values=x[:3])
    with torch.no_grad():
        expected = model(pixel_values=x[:3]).logits
    assert type(got).__name__ == "ImageClassifierOutputWithNoAttention"
    noise = (expected - got.logits).square().sum()
    assert 10 * math.log10(expected.square().sum() / noise) > least
    qk.save_model(made, tmp_path / "model.safetensors")
    loaded = qk.load_lowered(tmp_path / "model.safetensors")
    assert torch.equal(loaded(pixel_values=x[:3]).logits, got.logits)
