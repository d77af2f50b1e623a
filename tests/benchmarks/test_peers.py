"""Peers that are not there are left out with a reason; those that are compute what they should."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from qkernels import _C
from qkernels.bench import own
from qkernels.bench.engines import CnnEngine, CodecEngine, ConvEngine, LinearEngine, verified
from qkernels.bench.groups import convs
from qkernels.bench.groups.capped import environment
from qkernels.bench.groups.cnns import images, settled
from qkernels.bench.peers import PEERS, load_peers, torch_float
from qkernels.bench.plan import Conv, Shape

LOADED = load_peers()
LINEAR = [*own.linear_engines(), *LOADED.linear()]
# Compiling takes longer than a test may; the suite checks what it times.
CODECS = [e for e in (*own.codec_engines(), *LOADED.codecs()) if not e.name.endswith("compiled")]
CONVS = [*own.conv_engines(), *LOADED.convs()]
CNNS = [e for e in (*own.cnn_engines(), *LOADED.cnns()) if not e.compiled]
BACKWARD = [*own.backward_engines(), *torch_float.backward_engines()]


def ids(engine: LinearEngine | CodecEngine | ConvEngine | CnnEngine) -> str:
    return engine.name


def test_torch_needs_nothing_else() -> None:
    assert {"torch_float", "torch_ao", "torch_weight_only"} <= LOADED.modules.keys()
    assert LOADED.modules.keys() | LOADED.skipped.keys() == PEERS.keys()


def test_a_missing_peer_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "qkernels.bench.peers.onnxruntime", raising=False)
    peers = load_peers(("torch_float", "onnxruntime"))
    assert list(peers.modules) == ["torch_float"]
    assert peers.skipped["onnxruntime"].startswith("not installed (")
    assert peers.skipped["onnxruntime"].endswith("pip install onnxruntime")


@pytest.mark.parametrize("engine", LINEAR, ids=ids)
def test_linear_engines_are_right(engine: LinearEngine) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 512, generator=generator) * 512**-0.5
    x = torch.randn(17, 512, generator=generator)
    with torch.inference_mode():
        calls = engine.build(weight, 2)
        assert len(calls) == 2
        for call in calls:
            for m in (1, 3, 17):
                verified(engine.name, engine.kind, x[:m] @ weight.T, call(x[:m].to(engine.dtype)))


@pytest.mark.parametrize("engine", BACKWARD, ids=ids)
def test_backward_engines_are_right(engine: LinearEngine) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, grad = (torch.randn(48, k, generator=generator) for k in (256, 5))
    with torch.inference_mode():
        got = engine.build(weight, 1)[0](grad.T.contiguous().to(engine.dtype))
    verified(engine.name, engine.kind, grad.T @ weight, got)


@pytest.mark.parametrize("engine", CODECS, ids=lambda e: f"{e.task} {e.name}")
def test_codec_engines_are_right(engine: CodecEngine) -> None:
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    call, decode = engine.build(x)
    verified(engine.name, "8 bits" if engine.task.endswith("8") else "4 bits", x, decode(call()))


@pytest.mark.parametrize(
    "shape",
    [Conv(8, 12, 7, 3), Conv(3, 16, 11, 5, stride=2), Conv(16, 16, 6, 3, groups=16, batch=2)],
    ids=str,
)
@pytest.mark.parametrize("engine", CONVS, ids=ids)
def test_conv_engines_are_right(engine: ConvEngine, shape: Conv) -> None:
    task, reference = convs.data(shape)
    with torch.inference_mode():
        call, decode = engine.build(task)
        verified(engine.name, engine.kind, reference, decode(call()))


class Small(nn.Module):
    """A residual block between two layers, with an output like those of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> SimpleNamespace:
        x = self.first(x)
        return SimpleNamespace(logits=self.head((x + self.block(x)).relu()))


@pytest.mark.parametrize("engine", CNNS, ids=ids)
def test_cnn_engines_are_right(engine: CnnEngine) -> None:
    torch.manual_seed(0)
    model = settled(Small(), images(8, seed=0, size=32))
    x = images(4, seed=2, size=32)
    reference = model(x).detach()
    converted = engine.convert(model, list(images(8, seed=1, size=32).split(4)))
    with torch.inference_mode():
        for batch in (1, 4):
            verified(engine.name, engine.kind, reference[:batch], converted(x[:batch]))


def test_norms_fit_the_images() -> None:
    x = images(8, seed=0, size=32)
    model = settled(Small(), x)
    assert not model.training
    with torch.no_grad():
        normed = model.get_submodule("model.first.1")(model.get_submodule("model.first.0")(x))
    assert normed.mean((0, 2, 3)).abs().max() < 1e-4
    assert (normed.var((0, 2, 3)) - 1).abs().max() < 1e-2


def test_own_engines_cover_every_scheme() -> None:
    assert {type(s).__name__ for s in own.SCHEMES.values()} == set(_schemes())
    assert all(e.own for e in own.linear_engines())


def _schemes() -> list[str]:
    from qkernels.schemes import SCHEMES

    return list(SCHEMES)


def test_stored_bits_are_those_of_the_packed_weight() -> None:
    shape = Shape(4096, 64)
    for scheme in own.SCHEMES.values():
        block = _C.block_bytes(scheme.layout, shape.k, scheme.group_size)
        packed = 8 * block / (16 * shape.k)
        # The packed form adds sums of a row, and fills lines.
        assert own.stored_bits(scheme) == pytest.approx(packed, rel=0.02)


def test_a_cap_names_the_instruction_set_to_all() -> None:
    for isa in _C.isas()[1:]:
        assert environment(isa)["QKERNELS_ISA"] == isa
    assert set(environment("avx2").values()) == {"avx2", "AVX2"}
    assert set(environment("avx512").values()) == {"avx512", "AVX512"}
    # Others have no such name.
    assert set(environment("avxvnni").values()) == {"avxvnni", "avx2", "AVX2"}
