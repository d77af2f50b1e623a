"""Training wins back what few bits lost, on handwritten digits, for three seeds."""

import copy

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import qkernels as qk

# One scale for a row of 4-bit weights, of which some meet features that are 64 times others.
SCHEME = qk.W4A16(group_size=-1, symmetric=True)
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def digits():
    """Half of the images to train on, half to test on; each pixel in units of its own."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    units = 2.0 ** (6 * torch.rand(64, generator=torch.Generator().manual_seed(3)) - 3)
    x = (x + 0.35 * noise)[order] * units
    y = y[order]
    half = len(x) // 2
    return x[:half], y[:half], x[half:], y[half:]


def fit(model, x, y, epochs, lr, seed, scales=()):
    rest = [p for p in model.parameters() if all(p is not s for s in scales)]
    groups = [{"params": rest}, *([{"params": list(scales), "lr": lr / 10}] if scales else [])]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(64):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model, x, y):
    return (model(x).argmax(1) == y).float().mean().item()


@pytest.fixture(scope="module")
def trained(digits):
    """Float models, one for each seed."""
    models = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        widths = (nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
        models.append(fit(nn.Sequential(*widths), *digits[:2], epochs=40, lr=3e-3, seed=seed))
    return models


@pytest.mark.parametrize("learn_scale", [False, True])
def test_int4(digits, trained, learn_scale):
    """Measured: float 72.8 %, without training 68.4 %, with 71.4 % and, scales learned, 71.0 %."""
    x, y, *test = digits
    found = []
    for seed, model in zip(SEEDS, trained, strict=True):
        ptq, qat = copy.deepcopy(model), copy.deepcopy(model)
        qk.quantize_(ptq, SCHEME)
        qk.prepare_qat_(qat, SCHEME, learn_scale=learn_scale)
        fit(qat, x, y, 15, 1e-3, seed + 10, qk.qat.learned_parameters(qat))
        qk.convert_(qat)
        found.append([accuracy(m, *test) for m in (model, ptq, qat)])
    exact, lost, regained = torch.tensor(found).mean(0).tolist()
    assert exact - lost > 0.02, found
    assert regained - lost > 0.4 * (exact - lost), found
