"""Schemes and a small model that the adapters' tests use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import qkernels as qk

SCHEMES = (None, qk.W8A8(), qk.W8A16(), qk.W4A16(group_size=16), qk.W4A8(24), qk.NF4(16))


@pytest.fixture(params=SCHEMES, ids=str)
def scheme(request: pytest.FixtureRequest) -> qk.Scheme | None:
    """Every kind of base, the float one first."""
    return request.param


@pytest.fixture
def mlp() -> Callable[[qk.Scheme | None], nn.Sequential]:
    """Makes the same small model each time; sizes that fill neither a block nor a group."""

    def make(scheme: qk.Scheme | None) -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(70, 33), nn.Tanh(), nn.Linear(33, 18, bias=False))
        if scheme is not None:
            qk.quantize_(model, scheme)
        return model

    return make


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 70, generator=torch.Generator().manual_seed(1))
