"""model.set_attn_implementation("qkernels") for models of transformers."""

import pytest
import torch
import transformers

import qkernels as qk
import qkernels.hf

hf_attention = qkernels.hf.hf_attention
SIZES = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 50, "num_attention_heads": 4}
BERT = transformers.BertConfig(num_hidden_layers=2, **SIZES)
LLAMA = transformers.LlamaConfig(num_hidden_layers=2, num_key_value_heads=2, **SIZES)
TOKENS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
PADDED = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])


@pytest.fixture
def calls(monkeypatch):
    """How often transformers' own attention is called by ours."""
    found = []

    def counted(*args, **kwargs):
        found.append(1)
        return transformers.integrations.sdpa_attention.sdpa_attention_forward(*args, **kwargs)

    monkeypatch.setattr(hf_attention, "sdpa_attention_forward", counted)
    return found


def made(config, dtype=torch.float32):
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval().to(dtype)
    qk.quantize_(model, qk.W8A16())
    return model


def hidden(model, implementation, **inputs):
    model.set_attn_implementation(implementation)
    return model(input_ids=TOKENS, **inputs).last_hidden_state


@pytest.mark.parametrize("config", [BERT, LLAMA], ids=["bert", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_what_torch_does(config, dtype, calls):
    model = made(config, dtype)
    limit = 1e-5 if dtype == torch.float32 else 0.03
    for mask in (None, torch.ones_like(PADDED), PADDED):
        with torch.no_grad():
            wanted = hidden(model, "sdpa", attention_mask=mask)
            got = hidden(model, "qkernels", attention_mask=mask)
        there = PADDED.bool() if mask is PADDED else torch.ones(2, 9, dtype=torch.bool)
        error = (got - wanted)[there].float().norm() / wanted[there].float().norm()
        assert error < limit
    assert not calls


def test_token_by_token(calls):
    model = made(LLAMA)
    with torch.no_grad():
        whole = hidden(model, "qkernels")
        cache, rows = None, []
        for i in range(9):
            out = model(input_ids=TOKENS[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.last_hidden_state)
    torch.testing.assert_close(torch.cat(rows, 1), whole, rtol=1e-4, atol=1e-4)
    assert not calls


def test_gradients_and_dropout_are_torchs(calls):
    model = made(BERT)
    hidden(model, "qkernels").sum().backward()
    assert len(calls) == 2
    assert model.embeddings.LayerNorm.weight.grad is not None
    model.train()
    with torch.no_grad():
        hidden(model, "qkernels")
    assert len(calls) == 4


def test_other_types_are_torchs(calls):
    x = torch.randn(2, 4, 3, 8, dtype=torch.double)
    hf_attention.attention_forward(torch.nn.Module(), x, x, x, None)
    x = torch.randn(2, 4, 3, 8)
    hf_attention.attention_forward(torch.nn.Module(), x[:1], x, x, None)
    bias = torch.randn(1, 4, 3, 3)
    hf_attention.attention_forward(torch.nn.Module(), x, x, x, None, position_bias=bias)
    assert len(calls) == 3


def test_sinks_are_refused():
    x = torch.randn(2, 4, 3, 8)
    with pytest.raises(ValueError, match="attention sinks"):
        hf_attention.attention_forward(torch.nn.Module(), x, x, x, None, s_aux=torch.randn(4))


def test_compiled_by_qkernels():
    torch._dynamo.reset()
    model = made(BERT)
    model.set_attn_implementation("qkernels")
    compiled = torch.compile(model, backend="qkernels", fullgraph=True)
    with torch.no_grad():
        got = compiled(input_ids=TOKENS, attention_mask=PADDED).last_hidden_state
        wanted = model(input_ids=TOKENS, attention_mask=PADDED).last_hidden_state
    torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-3)
    torch._dynamo.reset()
