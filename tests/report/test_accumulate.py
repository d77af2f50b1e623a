"""Running statistics against the same numbers computed at once."""

import math

import pytest
import torch

from qkernels.report.accumulate import Noise, RowStatistics, looks_like_logits

NAN, INF = float("nan"), float("inf")


def test_noise_of_several_batches_is_the_noise_of_all():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(50, 7, generator=generator)
    output = reference + 0.01 * torch.randn(50, 7, generator=generator)
    noise = Noise()
    for out, ref in zip(output.split(13), reference.split(13), strict=True):
        noise.add(out, ref)
    error = (output.double() - reference.double()).flatten()
    expected = 10 * math.log10(float(reference.double().square().sum() / error.square().sum()))
    assert noise.sqnr_db == pytest.approx(expected)
    assert noise.max_abs_error == pytest.approx(float(error.abs().max()))
    assert noise.values == 350


def test_noise_of_tensors_beyond_one_chunk():
    reference = torch.ones((1 << 18) + 3)
    noise = Noise()
    noise.add(reference + 0.5, reference)
    assert noise.values == (1 << 18) + 3
    assert noise.sqnr_db == pytest.approx(10 * math.log10(4))


def test_limits_of_sqnr():
    noise = Noise()
    assert noise.sqnr_db is None
    noise.add(torch.ones(3), torch.ones(3))
    assert noise.sqnr_db == INF
    silent = Noise()
    silent.add(torch.ones(3), torch.zeros(3))
    assert silent.sqnr_db == -INF


def test_nonfinite_positions_are_counted_and_left_out():
    noise = Noise()
    noise.add(torch.tensor([1.0, NAN, 3.0, INF]), torch.tensor([1.0, 2.0, INF, INF]))
    assert (noise.values, noise.nonfinite, noise.nonfinite_reference) == (1, 2, 2)
    assert noise.sqnr_db == INF


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_large_values_of_every_dtype_do_not_overflow(dtype):
    noise = Noise()
    largest = min(torch.finfo(dtype).max / 2, 1e100)
    big = torch.full((4,), largest, dtype=dtype)
    noise.add(big, big / 2)
    assert noise.sqnr_db == pytest.approx(0.0, abs=0.1)


def test_cosine_and_agreement():
    rows = RowStatistics()
    rows.add(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[2.0, 0.0], [3.0, 0.0]]),
             agreement=True)  # fmt: skip
    assert (rows.rows, rows.cosine_mean, rows.cosine_min) == (2, 0.5, 0.0)
    assert (rows.agreement, rows.predictions) == (0.5, 2)


def test_zero_and_tiny_rows():
    rows = RowStatistics()
    zero, tiny = torch.zeros(1, 3), torch.full((1, 3), 1e-38)
    rows.add(torch.cat([zero, zero, tiny]), torch.cat([zero, tiny, tiny]), agreement=False)
    assert rows.cosine_mean == pytest.approx(2 / 3)
    assert rows.agreement is None


def test_a_row_with_nan_is_no_agreement_and_no_cosine():
    rows = RowStatistics()
    reference = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    rows.add(torch.tensor([[NAN, 0.0], [1.0, 0.0]]), reference, agreement=True)
    assert (rows.nonfinite, rows.nonfinite_reference) == (1, 0)
    assert (rows.agreement, rows.cosine_count) == (0.5, 1)


def test_images_vote_along_their_channels():
    rows = RowStatistics()
    images = torch.randn(2, 5, 3, 4)
    rows.add(images, images, agreement=True)
    assert (rows.predictions, rows.rows) == (2 * 3 * 4, 2)


def test_what_looks_like_logits():
    x = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
    assert looks_like_logits("output", x)
    assert looks_like_logits("logits", x / x.norm(dim=1, keepdim=True))
    assert not looks_like_logits("output", x / x.norm(dim=1, keepdim=True))
    assert not looks_like_logits("last_hidden_state", x)
    assert not looks_like_logits("logits", x[:, :1])
    assert not looks_like_logits("output", x[0])
