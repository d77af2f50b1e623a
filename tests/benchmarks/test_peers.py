"""Peers that are not there are left out with a reason; those that are compute what they should."""

import sys

import pytest
import torch

from qkernels import _C
from qkernels.bench import own
from qkernels.bench.engines import CodecEngine, LinearEngine, verified
from qkernels.bench.groups.capped import environment
from qkernels.bench.peers import PEERS, load_peers, torch_float
from qkernels.bench.plan import Shape

LOADED = load_peers()
LINEAR = [*own.linear_engines(), *LOADED.linear()]
# Compiling takes longer than a test may; the suite checks what it times.
CODECS = [e for e in (*own.codec_engines(), *LOADED.codecs()) if not e.name.endswith("compiled")]
BACKWARD = [*own.backward_engines(), *torch_float.backward_engines()]


def ids(engine: LinearEngine | CodecEngine) -> str:
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
        assert set(environment(isa).values()) == {isa, isa.upper()}
