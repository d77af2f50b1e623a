"""save_model and load_model: round trips, what is stored, and files that do not fit the model."""

import json
import os
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

import qkernels as qk
from qkernels.io import ModelFileError, read_header
from qkernels.nn import QEmbedding, QLinear

ROOT = Path(__file__).parents[2]


class Model(nn.Module):
    """Every kind of state: tied, buffers, non-persistent, a module without state."""

    def __init__(self, width=24, bias=True, tie=True):
        super().__init__()
        self.embed = nn.Embedding(40, width)
        self.body = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width, bias))
        self.norm = nn.BatchNorm1d(width)
        self.lm_head = nn.Linear(width, 40, bias=False)
        self.register_buffer("scratch", torch.ones(3), persistent=False)
        if tie:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens):
        return self.lm_head(self.norm(self.body(self.embed(tokens))))


TOKENS = torch.arange(40)


def saved_model(scheme, path, **options):
    torch.manual_seed(0)
    model = Model(**options)
    model.train()(TOKENS)  # so that the statistics of the norm are not the initial ones
    model.eval()
    qk.quantize_(model, scheme, ignore=())
    qk.save_model(model, path, {"epochs": 3})
    return model


def fresh(**options):
    torch.manual_seed(9)
    return Model(**options).eval()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("target", ["float", "quantized", "meta", "meta quantized"])
def test_outputs_are_the_same_to_the_bit(scheme, path, target):
    model = saved_model(scheme, path)
    if "meta" in target:
        with torch.device("meta"):
            other = Model()
        other.scratch = torch.ones(3)
        if "quantized" in target:
            other.embed = QEmbedding(40, 24, scheme=scheme, device="meta")
            other.lm_head = QLinear(24, 40, False, scheme, device="meta")
            other.lm_head.packed = other.embed.packed
            other.body[0] = QLinear(24, 24, True, scheme, device="meta")
            other.body[2] = QLinear(24, 24, True, scheme, device="meta")
        other.eval()
    else:
        other = fresh()
        if target == "quantized":
            qk.quantize_(other, scheme, ignore=())
            kept = other.embed.packed
    assert qk.load_model(other, path) is other
    assert torch.equal(other(TOKENS), model(TOKENS))
    assert other.embed.packed is other.lm_head.packed
    assert other.body[0].qualified_name in ("body.0", "")
    assert not other.embed.packed.requires_grad
    assert other.body[0].bias.requires_grad
    if target == "quantized":
        assert other.embed.packed is kept
    for tensor in [*other.parameters(), *other.buffers()]:
        assert not tensor.is_meta


def test_loading_into_tied_float_weights_keeps_one_copy(path):
    torch.manual_seed(0)
    model = Model()
    qk.quantize_(model, {"body": qk.W8A8()})
    qk.save_model(model, path)
    with torch.device("meta"):
        other = Model()
    other.scratch = torch.ones(3)
    for target in (fresh(), other):
        qk.load_model(target, path)
        assert target.embed.weight is target.lm_head.weight
        assert target.embed.weight.requires_grad
        assert torch.equal(target.embed.weight, model.embed.weight)


def test_a_float_model_can_be_saved_too(path):
    model = fresh()
    qk.save_model(model, path)
    assert torch.equal(qk.load_model(Model().eval(), path)(TOKENS), model(TOKENS))


def test_half_precision_models(path):
    model = saved_model(qk.W4A16(8), path).to(torch.bfloat16)
    qk.save_model(model, path)
    other = qk.load_model(fresh().to(torch.bfloat16), path)
    assert other.embed.dtype == torch.bfloat16
    assert torch.equal(other(TOKENS), model(TOKENS))


def test_static_scales_are_stored(path):
    layer = QLinear.from_float(
        nn.Linear(8, 4), qk.W8A8(static=True, activation="asymmetric"), x_scale=0.1, x_zero_point=3
    )
    model = nn.Sequential(layer)
    qk.save_model(model, path)
    other = qk.load_model(nn.Sequential(nn.Linear(8, 4)), path)
    x = torch.randn(3, 8)
    assert torch.equal(other(x), model(x))
    assert other[0].x_zero_point.item() == 3


def test_a_quantized_root_loads_in_place(path):
    layer = QLinear(8, 4)
    qk.save_model(layer, path)
    other = qk.load_model(QLinear(8, 4), path)
    assert torch.equal(other.packed, layer.packed)
    with pytest.raises(ModelFileError, match="cannot be replaced in place"):
        qk.load_model(nn.Linear(8, 4), path)


def test_a_shared_module_is_loaded_once(path):
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    qk.quantize_(model, qk.W8A8())
    qk.save_model(model, path)
    linear = nn.Linear(8, 8)
    other = qk.load_model(nn.Sequential(linear, nn.ReLU(), linear), path)
    assert other[0] is other[2]
    apart = qk.load_model(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), path)
    assert apart[0].packed is apart[2].packed
    x = torch.randn(2, 8)
    assert torch.equal(apart(x), model(x))


def test_in_a_fresh_process(path):
    model = saved_model(qk.W8A8(), path)
    torch.save(model(TOKENS), path.with_suffix(".pt"))
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch, qkernels as qk
from test_model_files import Model, TOKENS
model = qk.load_model(Model().eval(), {str(path)!r})
assert torch.equal(model(TOKENS), torch.load({str(path.with_suffix(".pt"))!r}))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


def test_the_header_says_what_is_in_the_file(path, scheme):
    model = saved_model(scheme, path)
    header = read_header(path)
    has_parts = scheme.format == "int4" and not scheme.symmetric  # of codes, as zero points
    assert header.version == (4 if has_parts else 1)
    assert header.written_by == qk.__version__
    assert header.metadata == {"epochs": 3}
    assert set(header.modules) == {"embed", "lm_head", "body.0", "body.2"}
    entry = header.modules["lm_head"]
    assert (entry.kind, entry.scheme, entry.shape, entry.dtype) == (
        "QLinear",
        scheme,
        (40, 24),
        torch.float32,
    )
    assert header.tied["lm_head.weight"] == "embed.weight"
    stored = safetensors.torch.load_file(path)
    assert stored.keys() == model.state_dict().keys() - header.tied.keys()
    assert header.checksums.keys() == stored.keys()
    state = model.state_dict()
    assert all(torch.equal(stored[key], state[key]) for key in stored)
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_the_file_is_small(path):
    saved_model(qk.W8A8(), path)
    tensors = sum(t.nbytes for t in safetensors.torch.load_file(path).values())
    assert path.stat().st_size < tensors + 6000


def test_metadata_of_the_user(path):
    model = nn.Sequential(QLinear(4, 4))
    nested = {"a": [1, {"b": None}], "ü": "ß", "pi": 3.5}
    qk.save_model(model, path, nested)
    assert read_header(path).metadata == nested
    for bad in ({"a": object()}, {"a": float("nan")}, {"a": {1, 2}}):
        with pytest.raises(TypeError, match="metadata"):
            qk.save_model(model, path, bad)


# ---- writing all or nothing ----------------------------------------------------------------------


def test_a_failed_save_leaves_the_old_file(path, monkeypatch):
    saved_model(qk.W8A8(), path)
    before = path.read_bytes()
    import qkernels.io.save as save

    def full_disk(tensors, target, metadata):
        Path(target).write_bytes(b"half of it")
        raise save.SafetensorError("No space left on device")

    monkeypatch.setattr(save, "save_file", full_disk)
    with pytest.raises(OSError, match=r"save_model: cannot write .*No space left"):
        qk.save_model(nn.Linear(3, 3), path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_an_interrupted_replace_leaves_the_old_file(path, monkeypatch):
    saved_model(qk.W8A8(), path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        qk.save_model(nn.Linear(3, 3), path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_permissions_and_links(path):
    qk.save_model(nn.Linear(3, 3), path)
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    path.chmod(0o640)
    link = path.with_name("link.safetensors")
    link.symlink_to(path)
    qk.save_model(nn.Linear(4, 4), link)
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    qk.load_model(nn.Linear(4, 4), path)


def test_a_model_can_be_saved_over_the_file_it_came_from(path):
    model = saved_model(qk.W8A8(), path)
    with torch.device("meta"):
        other = Model()
    other.scratch = torch.ones(3)
    qk.load_model(other.eval(), path)
    for _ in range(2):
        qk.save_model(other, path)
        assert torch.equal(other(TOKENS), model(TOKENS))
        qk.load_model(other, path)
    assert torch.equal(other(TOKENS), model(TOKENS))


class WithExtraState(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize(
    ("make", "where", "kind", "words"),
    [
        (lambda: nn.Linear(3, 3), "missing/m.safetensors", FileNotFoundError, ["no folder"]),
        (lambda: nn.Linear(3, 3), ".", IsADirectoryError, ["is a folder"]),
        (lambda: nn.Linear(3, 3, device="meta"), "m", ValueError, ["weight", "no values"]),
        (lambda: QLinear(3, 3, device="meta"), "m", ValueError, ["meta device"]),
        (lambda: nn.LazyLinear(3), "m", ValueError, ["LazyLinear"]),
        (lambda: WithExtraState(3, 3), "m", ValueError, ["WithExtraState", "get_extra_state"]),
        (lambda: "model", "m", TypeError, ["model is str"]),
    ],
)
def test_saving_refuses_with_a_sentence(tmp_path, make, where, kind, words):
    with pytest.raises(kind) as caught:
        qk.save_model(make(), tmp_path / where)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert os.listdir(tmp_path) == []


def test_overlapping_tensors_are_stored_apart(path):
    model = nn.Module()
    base = torch.arange(12.0)
    model.register_buffer("a", base[:8].view(2, 4))
    model.register_buffer("b", base[4:])
    model.register_buffer("c", base[:8].view(2, 4).t())
    model.register_buffer("empty", torch.empty(0, 3))
    qk.save_model(model, path)
    other = nn.Module()
    for name, shape in (("a", (2, 4)), ("b", (8,)), ("c", (4, 2)), ("empty", (0, 3))):
        other.register_buffer(name, torch.zeros(shape))
    qk.load_model(other, path)
    for name in ("a", "b", "c"):
        assert torch.equal(getattr(other, name), getattr(model, name))


# ---- files that do not fit the model -------------------------------------------------------------


def untouched(model, before):
    now = dict(model.named_modules())
    same = all(module is before[0].get(name) for name, module in now.items())
    return same and all(torch.equal(t, before[1][n]) for n, t in model.state_dict().items())


def state_of(model):
    return dict(model.named_modules()), {n: t.clone() for n, t in model.state_dict().items()}


def without(model, name):
    delattr(model, name)
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: fresh(width=16), ["embed", "shape (40, 16)", "(40, 24)"]),
        (lambda: fresh(bias=False), ["no place for", "body.2.bias"]),
        (lambda: without(fresh(), "lm_head"), ["'lm_head'", "does not have"]),
        (lambda: without(fresh(), "norm"), ["no place for", "norm.bias"]),
        (lambda: fresh().bfloat16(), ["torch.float32 in the file", ".to(torch.float32)"]),
        (lambda: nn.Sequential(nn.Linear(3, 3)), ["'embed'", "Sequential"]),
    ],
)
def test_another_architecture(path, make, words):
    saved_model(qk.W8A8(), path)
    model = make()
    before = state_of(model)
    with pytest.raises(ModelFileError) as caught:
        qk.load_model(model, path)
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert "\n" not in text
    assert untouched(model, before)


def test_missing_tensors_are_named(path):
    saved_model(qk.W8A8(), path)
    model = fresh()
    model.extra = nn.Linear(3, 3)
    with pytest.raises(ModelFileError, match=r"it lacks extra.bias, extra.weight"):
        qk.load_model(model, path)


def test_other_kinds_of_modules(path):
    saved_model(qk.W8A8(), path)
    model = fresh()
    model.body[0] = nn.Bilinear(24, 24, 24)
    with pytest.raises(ModelFileError, match=r"body.0 \(Bilinear\) is QLinear in"):
        qk.load_model(model, path)
    model = fresh()
    model.body[0] = nn.utils.parametrizations.weight_norm(model.body[0])
    with pytest.raises(ModelFileError, match="parametrization"):
        qk.load_model(model, path)
    model = fresh()
    model.body[0] = WithExtraState(24, 24)
    with pytest.raises(ModelFileError, match="get_extra_state"):
        qk.load_model(model, path)


def test_other_schemes_in_the_model(path):
    saved_model(qk.W8A8(), path)
    model = fresh()
    qk.quantize_(model, qk.W4A16(8), ignore=())
    before = state_of(model)
    with pytest.raises(ModelFileError, match=r"W4A16\(group_size=8\).*W8A8\(\)"):
        qk.load_model(model, path)
    assert untouched(model, before)
    float_file = path.with_name("float.safetensors")
    qk.save_model(fresh(), float_file)
    with pytest.raises(ModelFileError, match="quantized in the model but not in"):
        qk.load_model(model, float_file)
    assert untouched(model, before)


def test_a_non_persistent_buffer_on_meta_cannot_be_filled(path):
    saved_model(qk.W8A8(), path)
    with torch.device("meta"):
        model = Model()
    with pytest.raises(ModelFileError, match=r"scratch .*non-persistent"):
        qk.load_model(model, path)
    assert model.embed.weight.is_meta


def test_a_tensor_that_cannot_be_written_to(path):
    model = nn.Sequential(nn.Linear(4, 4))
    qk.save_model(model, path)
    other = nn.Sequential(nn.Linear(4, 4))
    other[0].bias = nn.Parameter(torch.zeros(1).expand(4))
    before = other[0].weight.clone()
    with pytest.raises(ModelFileError, match=r"0\.bias is an expanded tensor"):
        qk.load_model(other, path)
    assert torch.equal(other[0].weight, before)


def test_wrong_argument(path):
    with pytest.raises(TypeError, match="model is str"):
        qk.load_model("model", path)


def test_newer_versions_say_upgrade(path):
    saved_model(qk.W8A8(), path)
    rewrite(path, lambda document: document.update(version=5, written_by="9.9"))
    with pytest.raises(ModelFileError, match=r"file version 5.*9\.9.*upgrade"):
        qk.load_model(fresh(), path)


def test_files_with_zero_points_in_whole_codes_are_refused(path):
    saved_model(qk.W4A16(16, symmetric=True), path)
    rewrite(path, lambda document: document.update(version=3))
    qk.load_model(fresh(), path)
    saved_model(qk.W4A16(16), path)
    qk.load_model(fresh(), path)
    rewrite(path, lambda document: document.update(version=3))
    model = fresh()
    before = model.body[0].weight.clone()
    with pytest.raises(ModelFileError, match=r"cannot be read: .*were whole codes.*quantize the"):
        qk.load_model(model, path)
    assert torch.equal(model.body[0].weight, before)


def rewrite(path, change):
    """Change the JSON document in the file's metadata."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    document = json.loads(header["__metadata__"]["qkernels"])
    change(document)
    header["__metadata__"]["qkernels"] = json.dumps(document)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
