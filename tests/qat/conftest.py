"""Small models and data that the tests of quantization-aware training share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qkernels as qk

SCHEMES = (
    qk.W8A8(),
    qk.W8A8(activation="asymmetric", group_size=16),
    qk.W8A8(static=True),
    qk.W8A8(static=True, activation="asymmetric"),
    qk.W8A16(),
    qk.W4A16(group_size=16),
    qk.W4A16(group_size=-1, symmetric=True, scale_dtype=torch.float16),
    qk.W4A8(group_size=24),
    qk.NF4(group_size=16),
)


@pytest.fixture(params=SCHEMES, ids=str)
def scheme(request: pytest.FixtureRequest) -> qk.Scheme:
    return request.param


@pytest.fixture
def mlp() -> Callable[[], nn.Sequential]:
    """Makes the same small model each time; sizes that fill neither a block nor a group."""

    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(70, 33), nn.ReLU(), nn.Linear(33, 18, bias=False))

    return make


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 70, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, inputs: Tensor, target: Tensor, steps: int = 3, lr: float = 1e-3):
    """A few steps of Adam on class scores; gives the losses."""
    scales = [p for name, p in model.named_parameters() if "scale" in name]
    rest = [p for name, p in model.named_parameters() if "scale" not in name]
    optimizer = torch.optim.Adam([{"params": rest}, {"params": scales, "lr": lr / 100}], lr=lr)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(inputs).flatten(0, -2), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
