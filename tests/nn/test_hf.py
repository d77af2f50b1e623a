"""save_pretrained and from_pretrained of transformers, for models with quantized layers."""

import copy
import json
import pickle

import pytest
import torch
import transformers
from safetensors import safe_open

import qkernels as qk
import qkernels.hf

BERT = transformers.BertConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    vocab_size=50,
    num_labels=3,
)
LLAMA = transformers.LlamaConfig(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=64,
    vocab_size=50,
    tie_word_embeddings=True,
)
RESNET = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1])
Bert = transformers.BertForSequenceClassification
Llama = transformers.LlamaForCausalLM
TOKENS = torch.arange(10)[None]


def bert():
    torch.manual_seed(0)
    return Bert(BERT).eval()


def outputs(model, x=TOKENS):
    with torch.no_grad():
        return model(x).logits


def config_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(
    "scheme", [qk.W8A8(), qk.W4A8(group_size=32), qk.W4A16(group_size=24), qk.NF4(group_size=32)]
)
@pytest.mark.parametrize("shard", ["1GB", "8KB"], ids=["one file", "shards"])
def test_what_comes_back_is_the_same_to_the_bit(scheme, shard, tmp_path):
    model = bert()
    summary = qk.quantize_(model, scheme)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors").exists() == (shard == "1GB")
    loaded, info = Bert.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(outputs(loaded), outputs(model))
    schemes = [m.scheme for m in loaded.modules() if isinstance(m, qk.nn.QModule)]
    assert schemes == [scheme] * len(summary.converted)
    loaded.save_pretrained(tmp_path / "again")
    again = Bert.from_pretrained(tmp_path / "again")
    assert torch.equal(outputs(again), outputs(model))


def test_codes_are_under_no_name_that_a_float_model_would_load(tmp_path):
    model = bert()
    qk.quantize_(model, qk.W8A8())
    model.save_pretrained(tmp_path)
    layers = {name for name, m in model.named_modules() if isinstance(m, qk.nn.QModule)}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {f"{name}.weight_codes" for name in layers} <= names
        assert not {f"{name}.weight" for name in layers} & names
        codes = file.get_tensor("classifier.weight_codes")
    assert torch.equal(codes, model.classifier.quantized_weight().data)


def test_without_this_module_transformers_says_that_weights_are_missing(tmp_path, monkeypatch):
    model = bert()
    layers = qk.quantize_(model, qk.W8A8()).converted
    model.save_pretrained(tmp_path)
    monkeypatch.delitem(transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "qkernels")
    _, info = Bert.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {f"{row.name}.weight" for row in layers}


def test_tied_weights_stay_one(tmp_path):
    torch.manual_seed(0)
    model = Llama(LLAMA).eval()
    qk.quantize_(model, qk.W8A16(), ignore=())
    model.save_pretrained(tmp_path)
    assert config_of(tmp_path)["shared"] == {"lm_head": "model.embed_tokens"}
    loaded = Llama.from_pretrained(tmp_path)
    assert loaded.lm_head.packed is loaded.model.embed_tokens.packed
    assert torch.equal(outputs(loaded), outputs(model))


def test_a_float_head_stays_tied_to_its_float_embedding(tmp_path):
    torch.manual_seed(0)
    model = Llama(LLAMA).eval()
    qk.quantize_(model, qk.W8A16())
    model.save_pretrained(tmp_path)
    loaded = Llama.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(outputs(loaded), outputs(model))


def test_fused_activations_input_transforms_and_static_ranges(tmp_path):
    model = bert()
    calibration = qk.calibrate(model, [TOKENS])
    schemes = {"*": qk.W8A8(static=True), "*.output.dense": qk.W8A16()}
    qk.quantize_(model, schemes, calibration=calibration)
    layer = model.bert.encoder.layer[0].output.dense
    layer.set_input_transform(torch.rand(64) + 0.5, torch.randperm(64))
    assert qk.fuse_(model).converted
    model.save_pretrained(tmp_path)
    loaded = Bert.from_pretrained(tmp_path)
    assert loaded.bert.encoder.layer[0].output.dense.input_transforms == ("x_premul", "k_perm")
    assert loaded.bert.encoder.layer[1].intermediate.dense.epilogue == "gelu"
    assert torch.equal(outputs(loaded), outputs(model))


def test_convolutions(tmp_path):
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(RESNET).eval()
    qk.quantize_(model, qk.W8A8())
    model.save_pretrained(tmp_path)
    loaded = transformers.ResNetForImageClassification.from_pretrained(tmp_path)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(outputs(loaded, x), outputs(model, x))


def test_another_dtype_leaves_scales_as_they_are(tmp_path):
    model = bert()
    qk.quantize_(model, qk.W8A8())
    model.save_pretrained(tmp_path)
    loaded = Bert.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.classifier.bias.dtype == torch.bfloat16
    got = loaded.classifier.quantized_weight()
    assert torch.equal(got.scale, model.classifier.quantized_weight().scale)
    assert torch.equal(outputs(loaded), outputs(copy.deepcopy(model).bfloat16()))


def test_a_float_checkpoint_is_quantized_while_it_is_loaded(tmp_path):
    model = bert()
    model.save_pretrained(tmp_path)
    config = qkernels.hf.QuantizationConfig({"*": qk.W4A16(group_size=32)}, ignore="classifier")
    loaded = Bert.from_pretrained(tmp_path, quantization_config=config)
    assert isinstance(loaded.classifier, torch.nn.Linear)
    qk.quantize_(model, qk.W4A16(group_size=32), ignore="classifier")
    assert torch.equal(outputs(loaded), outputs(model))
    assert '"schemes"' in loaded.config.to_json_string()
    loaded.save_pretrained(tmp_path / "small")
    assert torch.equal(outputs(Bert.from_pretrained(tmp_path / "small")), outputs(model))


def test_a_dequantized_model_is_saved_as_a_float_one(tmp_path):
    model = bert()
    qk.quantize_(model, qk.W8A8())
    model.save_pretrained(tmp_path / "quantized")
    qk.dequantize_(model)
    model.save_pretrained(tmp_path / "float")
    assert "quantization_config" not in json.loads((tmp_path / "float/config.json").read_text())
    for loaded in (
        Bert.from_pretrained(tmp_path / "float"),
        Bert.from_pretrained(tmp_path / "quantized").dequantize(),
    ):
        assert torch.equal(loaded.classifier.weight, model.classifier.weight)
        torch.testing.assert_close(outputs(loaded), outputs(model))


def test_copies_and_pickles():
    model = bert()
    qk.quantize_(model, qk.W8A8())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(other), outputs(model))


def edit(name, value):
    def change(config):
        config[name] = value

    return change


def with_zero_points(version):
    def change(config):
        config["version"] = version
        config["modules"]["classifier"]["scheme"]["symmetric"] = False

    return change


class Examples(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return {"input_ids": TOKENS[0] + i, "labels": torch.tensor(i % 3)}


def trained(model, folder, steps, **more):
    settings = transformers.TrainingArguments(
        folder, max_steps=steps, save_steps=1, use_cpu=True, report_to=[], disable_tqdm=True
    )
    trainer = transformers.Trainer(model, settings, train_dataset=Examples())
    trainer.train(**more)
    return trainer.model.eval()


@pytest.mark.parametrize("scheme", [qk.W8A8(), qk.W4A16(group_size=16)], ids=str)
def test_the_trainer_trains_adapters_and_goes_on_from_a_checkpoint(scheme, tmp_path):
    base = bert()
    qk.quantize_(base, scheme)
    base.save_pretrained(tmp_path / "base")
    first, second = (Bert.from_pretrained(tmp_path / "base") for _ in range(2))
    for model in (first, second):
        qk.transfer.add_lora_(model, rank=2)
    trained(first, tmp_path / "run", 2)
    with torch.no_grad():  # as if the base had been another
        for layer in second.modules():
            if isinstance(layer, qk.nn.QModule):
                layer.packed.zero_()
    again = trained(second, tmp_path / "run", 2, resume_from_checkpoint=True)
    assert torch.equal(outputs(again), outputs(first))
    assert not torch.equal(outputs(again), outputs(base))


SPEECH = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": (16,),
    "conv_kernel": (3,),
    "conv_stride": (2,),
    "num_feat_extract_layers": 1,
    "num_conv_pos_embeddings": 2,
    "num_conv_pos_embedding_groups": 1,
}
WHISPER = {
    "vocab_size": 20,
    "d_model": 16,
    **{f"{part}_layers": 1 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 16 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
    "num_mel_bins": 4,
    "max_source_positions": 4,
    "max_target_positions": 4,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (transformers.BertForMaskedLM, BERT),  # the bias of its head has two names
        (transformers.Wav2Vec2Model, transformers.Wav2Vec2Config(**SPEECH)),
        (transformers.WhisperModel, transformers.WhisperConfig(**WHISPER)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_models_that_ask_their_layers_for_sizes_while_they_load(kind, config, tmp_path):
    model = kind(config).eval()
    layers = qk.quantize_(model, qk.W8A8(), ignore=()).converted
    assert layers
    model.save_pretrained(tmp_path)
    loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "change, message",
    [
        (edit("version", 99), "its version is 99"),
        (edit("modules", [1]), "is not one that this qkernels reads"),
        (edit("shared", {"classifier": "nobody"}), "'nobody', which is no quantized module"),
        (lambda c: c.pop("fused"), "is not one that this qkernels reads: 'fused'"),
        (
            lambda c: c["modules"].update(other=c["modules"]["classifier"]),
            "names a quantized module 'other', which BertForSequenceClassification does not have",
        ),
        (
            lambda c: c["modules"]["classifier"].update(shape=[3, 8]),
            r"classifier \(Linear\): its weight is a matrix of shape \(3, 32\), the file's",
        ),
        (with_zero_points(version=2), "lacks classifier.weight_zero_point"),
        (with_zero_points(version=1), "a weight for classifier that cannot be read: .* were whole"),
    ],
)
def test_a_damaged_config(change, message, tmp_path):
    model = bert()
    qk.quantize_(model, qk.W4A16(group_size=32, symmetric=True))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        Bert.from_pretrained(tmp_path)


def test_attention_of_torch(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = transformers.SiglipVisionConfig(
        **sizes, num_attention_heads=2, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    model = transformers.SiglipVisionModel(config).eval()
    x = torch.randn(2, 3, 16, 16)
    for scheme in (qk.W8A8(), {"*.v_proj": qk.W8A8(), "head.attention.out_proj": qk.W8A8()}):
        made = copy.deepcopy(model)
        qk.quantize_(made, scheme)
        made.save_pretrained(tmp_path)
        loaded = transformers.SiglipVisionModel.from_pretrained(tmp_path).eval()
        heads = [m for m in loaded.modules() if isinstance(m, qk.nn.QMultiheadAttention)]
        assert len(heads) == 1 and isinstance(heads[0].v_proj, qk.nn.QLinear)
        with torch.no_grad():
            assert torch.equal(loaded(x).pooler_output, made(x).pooler_output)
