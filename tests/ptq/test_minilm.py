"""A real model at 4.375 bits: every layer better than rounded to nearest, embeddings kept."""

import copy

import pytest
import torch
import torch.nn.functional as F

import qkernels as qk

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def task():
    """The float model, calibration batches, and test batches of other docstrings."""
    pytest.importorskip("transformers")
    model_module = pytest.importorskip("qkernels.demo.model")
    data_module = pytest.importorskip("qkernels.demo.data")
    data, tokenizer = data_module.docstring_dataset(150, 0), model_module.Tokenizer()
    calibration, test = (
        [batch for _, batch in tokenizer.batches([e.text for e in examples], 32)]
        for examples in (data.train[:256], data.test[:192])
    )
    return model_module.build_model(10, 0), calibration, test


def embeddings(model, batches):
    with torch.inference_mode():
        return torch.cat([model.embed(**batch) for batch in batches])


def test_gptq_keeps_the_embeddings_at_four_and_a_half_bits(task):
    model, calibration, test = task
    expected = embeddings(model, test)
    quantized = copy.deepcopy(model)
    summary = qk.quantize_calibrated_(
        quantized,
        calibration,
        {"*": qk.W4A16(group_size=64), "*.embeddings": qk.W8A16()},
        ignore="head",
        call=lambda m, batch: m.embed(**batch),
    )
    measured = [row for row in summary if row.sqnr is not None]
    assert len(measured) == 36
    assert not [row for row in measured if row.sqnr <= row.sqnr_nearest]
    layers = [m for m in quantized.modules() if isinstance(m, qk.nn.QLinear)]
    bits = [8 * m.quantized_weight().nbytes / (m.in_features * m.out_features) for m in layers]
    assert max(bits) <= 4.5
    assert F.cosine_similarity(embeddings(quantized, test), expected, dim=1).mean() >= 0.985
