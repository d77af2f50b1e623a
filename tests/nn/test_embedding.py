"""QEmbedding: construction, from_float and back, types, indices."""

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.nn import QEmbedding


def test_rows_are_those_of_the_dequantized_table(scheme):
    torch.manual_seed(0)
    table = QEmbedding.from_float(nn.Embedding(50, 70), scheme)
    indices = torch.tensor([[0, 49, 3], [3, 16, 15]])
    rows = table(indices)
    assert torch.equal(rows, table.dequantize()(indices))
    assert torch.equal(rows, table(indices.int()))
    assert not rows.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_the_result_s(dtype):
    table = QEmbedding.from_float(nn.Embedding(5, 8, dtype=dtype), qk.W8A16())
    assert table.dtype == table(torch.tensor([1])).dtype == dtype
    assert table.dequantize().weight.dtype == dtype
    for other in (torch.bfloat16, torch.float64, torch.float32):
        table.to(other)
        assert table(torch.tensor([1])).dtype == other


@pytest.mark.parametrize("shape", [(), (0,), (2, 3, 4)])
def test_any_shape_of_indices(shape, scheme):
    table = QEmbedding(9, 7, scheme=scheme)
    assert table(torch.zeros(shape, dtype=torch.long)).shape == (*shape, 7)


def test_padding_row_is_zero(scheme):
    table = QEmbedding(9, 7, -1, scheme=scheme)
    assert table.padding_idx == 8
    assert table(torch.tensor(8)).count_nonzero() == 0
    back = QEmbedding.from_float(nn.Embedding(9, 7, padding_idx=2), scheme).dequantize()
    assert back.padding_idx == 2
    assert back(torch.tensor(2)).count_nonzero() == 0


def test_constructor_draws_what_nn_embedding_draws(scheme):
    torch.manual_seed(3)
    table = QEmbedding(9, 7, scheme=scheme)
    torch.manual_seed(3)
    assert torch.equal(table.packed, QEmbedding.from_float(nn.Embedding(9, 7), scheme).packed)


def test_repr():
    assert repr(QEmbedding(9, 7, 1, scheme=qk.NF4())) == (
        "QEmbedding(9, 7, padding_idx=1, scheme=NF4(group_size=64), dtype=torch.float32)"
    )


class Scaled(nn.Embedding):
    def forward(self, indices):
        return 2 * super().forward(indices)


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: QEmbedding(4, 4, max_norm=1.0), ValueError, ["max_norm", "1.0"]),
        (lambda: QEmbedding(4, 4, padding_idx=4), ValueError, ["padding_idx is 4", "4 rows"]),
        (lambda: QEmbedding.from_float(Scaled(3, 3)), TypeError, ["Scaled"]),
        (lambda: QEmbedding.from_float(nn.Embedding(3, 3, max_norm=1.0)), ValueError, ["max_norm"]),
        (lambda: QEmbedding(4, 4)(torch.tensor([4])), RuntimeError, ["QEmbedding: ", "4"]),
        (lambda: QEmbedding(4, 4)(torch.tensor([-1])), RuntimeError, ["-1"]),
        (lambda: QEmbedding(4, 4)(torch.tensor([0.5])), RuntimeError, ["float32", "int64"]),
    ],
)
def test_refusals_are_sentences(make, kind, words):
    with pytest.raises(kind) as caught:
        make()
    assert all(word in str(caught.value) for word in words), str(caught.value)
