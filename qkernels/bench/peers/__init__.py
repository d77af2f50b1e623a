"""One adapter per peer. A peer that is not installed is left out, and the reason printed."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
from dataclasses import dataclass, field
from types import ModuleType

from qkernels.bench.engines import CnnEngine, CodecEngine, ConvEngine, LinearEngine, ModelEngine

# Module of this package: the distributions that it needs beyond torch, any one of them.
PEERS: dict[str, tuple[str, ...]] = {
    "torch_float": (),
    "torch_ao": (),
    "torch_weight_only": (),
    "torchao": ("torchao",),
    "bitsandbytes": ("bitsandbytes",),
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino",),
    "ggml": ("llama-cpp-python", "ggml-python"),
}
# They warn at import of what does not matter here, such as missing CUDA libraries.
_CHATTY = ("torchao", "bitsandbytes", "torch.utils._pytree")


@dataclass
class Peers:
    """The peers of this environment.

    Args:
        modules: the adapters that loaded, by name.
        skipped: why the others did not.
    """

    modules: dict[str, ModuleType] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def linear(self) -> list[LinearEngine]:
        return [e for m in self.modules.values() for e in _engines(m, "linear_engines")]

    def models(self) -> list[ModelEngine]:
        return [e for m in self.modules.values() for e in _engines(m, "model_engines")]

    def codecs(self) -> list[CodecEngine]:
        return [e for m in self.modules.values() for e in _engines(m, "codec_engines")]

    def convs(self) -> list[ConvEngine]:
        return [e for m in self.modules.values() for e in _engines(m, "conv_engines")]

    def cnns(self) -> list[CnnEngine]:
        return [e for m in self.modules.values() for e in _engines(m, "cnn_engines")]

    def versions(self) -> dict[str, str]:
        """Version of every distribution that a loaded peer uses."""
        found = {}
        for name in self.modules:
            for distribution in PEERS[name]:
                try:
                    found[distribution] = importlib.metadata.version(distribution)
                    break
                except importlib.metadata.PackageNotFoundError:
                    continue
        return found


def load_peers(names: tuple[str, ...] = tuple(PEERS)) -> Peers:
    """Import the adapters.

    Args:
        names: keys of `PEERS`; all by default.

    Example:
        >>> sorted(load_peers(("torch_float",)).modules)
        ['torch_float']
    """
    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(logging.ERROR)
    peers = Peers()
    for name in names:
        try:
            module = importlib.import_module(f"{__name__}.{name}")
            _engines(module, "linear_engines")
        except Exception as error:
            # A peer may fail in ways of its own, such as a library built for another torch.
            peers.skipped[name] = _reason(name, error)
        else:
            peers.modules[name] = module
    return peers


def _engines(module: ModuleType, kind: str) -> list:  # type: ignore[type-arg]
    return list(getattr(module, kind)()) if hasattr(module, kind) else []


def _reason(name: str, error: Exception) -> str:
    if isinstance(error, ImportError) and PEERS[name]:
        return f"not installed ({error}); pip install {PEERS[name][0]}"
    return f"{type(error).__name__}: {error}"
