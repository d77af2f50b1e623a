"""NaN and infinity: a row that holds one is not finite, and no other row changes."""

import pytest
import torch

from helpers.check import same_tensor
from helpers.data import FLOATS, INTEGER_KINDS, KINDS, Kind, floats, weight
from helpers.reference import NF4

BAD = (torch.nan, torch.inf, -torch.inf)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_bad_row_touches_no_other(kind: Kind, dtype: torch.dtype) -> None:
    w = weight(kind, 37, 70, 32)
    bias = floats((37,))
    for activation in (0, 1, 2) if kind in INTEGER_KINDS else (0,):
        for m in (1, 9, 20):
            clean = floats((m, 70), dtype)
            for i, value in enumerate(BAD):
                for epilogue in range(5):
                    x = clean.clone()
                    row, column = (5 * i) % m, (31 * i + epilogue) % 70
                    x[row, column] = value
                    y = w.linear(x, bias, activation=activation, epilogue=epilogue)
                    want = w.linear(clean, bias, activation=activation, epilogue=epilogue)
                    kept = torch.arange(m) != row
                    same_tensor(y[kept], want[kept])
                    if activation:
                        assert y[row].isnan().all()
                    elif epilogue == 0:
                        assert not y[row].isfinite().any()


@pytest.mark.parametrize("kind", INTEGER_KINDS, ids=str)
def test_premul_that_overflows_is_seen(kind: Kind) -> None:
    w = weight(kind, 17, 40)
    x = floats((3, 40)).abs() + 1
    x[1] *= 1e30
    premul = torch.ones(40)
    premul[7] = 1e30
    y = w.linear(x, activation=1, premul=premul)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_infinity_times_zero_is_nan_on_float_paths() -> None:
    """As IEEE has it: a code of zero does not hide an infinite activation."""
    for kind in KINDS:
        drawn = weight(kind, 16, 8)
        codes = drawn.codes.copy()
        codes[:, 3] = 7 if kind.form is NF4 else drawn.zero[:, 0] // kind.form.steps
        w = weight(kind, 16, 8, codes=codes)
        zero = torch.from_numpy(drawn.zero[:, 0] % kind.form.steps == 0)
        assert zero.any()
        for m in (1, 5):
            x = torch.ones(m, 8)
            x[:, 3] = torch.inf
            assert w.linear(x)[:, zero].isnan().all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_broken_weight_breaks_its_own_output_only(kind: Kind) -> None:
    """NaN scales are what quantizing a NaN gives; they must not spread over the block."""
    clean = weight(kind, 37, 64, 16)
    scale = clean.scale_tensor.clone()
    scale[21, 2] = torch.nan
    arguments = (scale, clean.zero_tensor, clean.layout, 64, 16)
    packed = torch.ops.qkernels.pack(clean.data, *arguments)
    others = torch.arange(37) != 21
    for activation in (0, 1, 2) if kind in INTEGER_KINDS else (0,):
        for m in (1, 9):
            x = floats((m, 64))
            extra = (None, None, None, None, None)
            sizes = (*clean.sizes, activation, 0)
            y = torch.ops.qkernels.linear(x, packed, *extra, *sizes)
            assert y[:, 21].isnan().all()
            same_tensor(y[:, others], clean.linear(x, activation=activation)[:, others])
    rows = torch.ops.qkernels.embedding(
        torch.arange(37), packed, clean.layout, 37, 64, 16, torch.float32
    )
    assert rows[21, 32:48].isnan().all()
    assert rows.isnan().sum() == 16


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradients_of_bad_rows(kind: Kind) -> None:
    w = weight(kind, 37, 70, 32)
    clean = floats((9, 37))
    bad = clean.clone()
    bad[4, 20] = torch.nan
    got, want = (
        torch.ops.qkernels.linear_backward_input(g, w.packed, *w.sizes) for g in (bad, clean)
    )
    assert got[4].isnan().all()
    kept = torch.arange(9) != 4
    same_tensor(got[kept], want[kept])
