"""ggml's CPU backend (llama.cpp's), in the shared libraries of llama-cpp-python or ggml-python."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qkernels.bench.engines import Call, LinearEngine

# Packages that carry the libraries, the newer ggml first, and where.
PACKAGES = {"llama-cpp-python": ("llama_cpp", "lib"), "ggml-python": ("ggml", "lib")}

_F32 = 0
# Name: (ggml's number, bits per weight with scales, whether it has a repacked form on x86).
_TYPES = {"q4_0": (2, 4.5, True), "q4_K": (12, 4.5, True), "q8_0": (8, 8.5, False)}
_KIND = {"q4_0": "4 bits", "q4_K": "4 bits", "q8_0": "8 bits"}


class _InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


# Result and argument types; p pointer, i int, l int64, z size_t.
_SIGNATURES: dict[str, dict[str, tuple[str, Any]]] = {
    "base": {
        "ggml_init": ("p", [_InitParams]),
        "ggml_new_tensor_2d": ("p", "pill"),
        "ggml_mul_mat": ("p", "ppp"),
        "ggml_new_graph": ("p", "p"),
        "ggml_build_forward_expand": ("", "pp"),
        "ggml_backend_tensor_set": ("", "ppzz"),
        "ggml_get_data": ("p", "p"),
        "ggml_log_set": ("", "pp"),
        "ggml_backend_alloc_ctx_tensors_from_buft": ("p", "pp"),
        "ggml_backend_graph_compute": ("i", "pp"),
        "ggml_quantize_chunk": ("z", "ippzzzp"),
        "ggml_row_size": ("z", "il"),
        "ggml_backend_cpu_buffer_type": ("p", ""),
        "ggml_backend_reg_dev_get": ("p", "pz"),
        "ggml_backend_reg_get_proc_address": ("p", "ps"),
    },
    "cpu": {
        "ggml_backend_cpu_init": ("p", ""),
        "ggml_backend_cpu_reg": ("p", ""),
        "ggml_backend_cpu_set_n_threads": ("", "pi"),
    },
}
_CTYPES: dict[str, Any] = {
    "": None,
    "p": ctypes.c_void_p,
    "i": ctypes.c_int,
    "l": ctypes.c_int64,
    "z": ctypes.c_size_t,
    "s": ctypes.c_char_p,
}


_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
    lambda level, text, data: None
)


def _folder() -> Path:
    for module, below in PACKAGES.values():
        spec = importlib.util.find_spec(module)
        for place in (spec.submodule_search_locations or []) if spec else []:
            if (Path(place) / below / "libggml-cpu.so").exists():
                return Path(place) / below
    raise ImportError(f"none of {', '.join(PACKAGES)} is installed")


@cache
def _library() -> SimpleNamespace:
    folder = _folder()
    functions: dict[str, Any] = {}
    for library, signatures in _SIGNATURES.items():
        loaded = ctypes.CDLL(str(folder / f"libggml-{library}.so"))
        for name, (result, arguments) in signatures.items():
            function = getattr(loaded, name)
            function.restype = _CTYPES[result]
            function.argtypes = [_CTYPES[a] if isinstance(a, str) else a for a in arguments]
            functions[name.removeprefix("ggml_")] = function
    made = SimpleNamespace(**functions)
    made.log_set(_SILENT, None)
    return made


@cache
def _backend() -> int:
    backend: int = _library().backend_cpu_init()
    return backend


@cache
def _repacking_buffer_type() -> int | None:
    """The buffer type whose tensors are interleaved for the CPU's kernels, as llama.cpp uses it."""
    g = _library()
    reg = g.backend_cpu_reg()
    address = g.backend_reg_get_proc_address(reg, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return None
    prototype = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)
    found = prototype(address)(g.backend_reg_dev_get(reg, 0))
    # AMX's buffer type, if there is one, comes before; the last is the repacking one.
    types: list[int] = []
    while found and found[len(types)]:
        types.append(found[len(types)])
    return types[-1] if types else None


class _Weight:
    """One copy of a quantized weight in ggml's memory, and a graph for every number of rows."""

    def __init__(self, name: str, quantized: np.ndarray, n: int, k: int) -> None:
        g = _library()
        kind, _, repacks = _TYPES[name]
        self.n, self.k = n, k
        self._context = _context()
        self._tensor = g.new_tensor_2d(self._context, kind, k, n)
        repacked = _repacking_buffer_type() if repacks else None
        if not g.backend_alloc_ctx_tensors_from_buft(
            self._context, repacked or g.backend_cpu_buffer_type()
        ):
            raise MemoryError("ggml could not allocate the weight")
        g.backend_tensor_set(self._tensor, quantized.ctypes.data, 0, quantized.nbytes)
        self._graphs: dict[int, tuple[int, Tensor, int]] = {}

    def _graph(self, rows: int) -> tuple[int, Tensor, int]:
        g = _library()
        context = _context()
        x = g.new_tensor_2d(context, _F32, self.k, rows)
        y = g.mul_mat(context, self._tensor, x)
        graph = g.new_graph(context)
        g.build_forward_expand(graph, y)
        if not g.backend_alloc_ctx_tensors_from_buft(context, g.backend_cpu_buffer_type()):
            raise MemoryError("ggml could not allocate the activations")
        # The next operation would read the result where it is, so it is not copied.
        result = (ctypes.c_float * (rows * self.n)).from_address(g.get_data(y))
        return x, torch.frombuffer(result, dtype=torch.float32).view(rows, self.n), graph

    def __call__(self, x: Tensor) -> Tensor:
        g = _library()
        rows = x.shape[0]
        if rows not in self._graphs:
            self._graphs[rows] = self._graph(rows)
        source, result, graph = self._graphs[rows]
        g.backend_cpu_set_n_threads(_backend(), torch.get_num_threads())
        g.backend_tensor_set(source, x.data_ptr(), 0, x.nbytes)
        if g.backend_graph_compute(_backend(), graph) != 0:
            raise RuntimeError("ggml could not compute the graph")
        return result


def _context() -> int:
    # Room for descriptions of tensors and one graph; their data lie in buffers of their own. It
    # lives as long as the process: the benchmark makes few, and needs each until its end.
    context: int = _library().init(_InitParams(4 << 20, None, True))
    return context


def _build(name: str) -> Any:
    def build(weight: Tensor, copies: int) -> Sequence[Call]:
        g = _library()
        kind = _TYPES[name][0]
        n, k = weight.shape
        block = 256 if name == "q4_K" else 32
        if k % block:
            raise ValueError(f"{name} needs in_features in multiples of {block}")
        quantized = np.empty(n * g.row_size(kind, k), np.uint8)
        half = n // 2

        def quantize(first: int, rows: int) -> None:
            source, target = weight.data_ptr(), quantized.ctypes.data
            g.quantize_chunk(kind, source, target, first * k, rows, k, None)

        with ThreadPoolExecutor(2) as pool:  # q4_K searches its scales, which takes a while
            list(pool.map(quantize, (0, half), (half, n - half)))
        return [_Weight(name, quantized, n, k) for _ in range(copies)]

    return build


def linear_engines() -> list[LinearEngine]:
    _library()
    return [
        LinearEngine(f"ggml {name}", _KIND[name], torch.float32, bits, "", _build(name))
        for name, (_, bits, _) in _TYPES.items()
    ]
