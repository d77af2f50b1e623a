"""Schemes and small models that most tests here use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import qkernels as qk

SCHEMES = (
    qk.W8A8(),
    qk.W8A8(activation="asymmetric", group_size=16),
    qk.W8A16(),
    qk.W4A16(group_size=16),
    qk.W4A16(group_size=-1, symmetric=True, scale_dtype=torch.float16),
    qk.W4A8(group_size=24),
    qk.NF4(group_size=16),
)


@pytest.fixture(params=SCHEMES, ids=str)
def scheme(request: pytest.FixtureRequest) -> qk.Scheme:
    """Every kind of weight: formats, groups, symmetry, scale types, activations."""
    return request.param


@pytest.fixture
def mlp() -> Callable[[], nn.Sequential]:
    """Makes the same small model each time; sizes that fill neither a block nor a group."""

    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(70, 33), nn.ReLU(), nn.Linear(33, 18, bias=False))

    return make


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 70, generator=torch.Generator().manual_seed(1))
