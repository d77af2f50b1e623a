"""OpenVINO: a MatMul with a compressed int8 or int4 weight, activations quantized dynamically.

Classifiers are those that onnxruntime's tools quantized, which OpenVINO runs with its own kernels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as op
from torch import Tensor, nn

from qkernels.bench.engines import Call, CnnEngine, LinearEngine, by_shape
from qkernels.bench.peers.qdq import write_static_int8

_GROUP = 128


def _compile(weight: ov.Node, n: int, k: int, group: int, copies: int) -> Sequence[Call]:
    x = op.parameter([-1, k], ov.Type.f32, name="x")
    matrix = op.convert(op.reshape(weight, np.array([n, k]), False), "f32")
    model = ov.Model([op.matmul(x, matrix, False, True)], [x], "linear")
    return [_request(model, DYNAMIC_QUANTIZATION_GROUP_SIZE=group) for _ in range(copies)]


def _request(model: ov.Model, **settings: int) -> Call:
    options: dict[str, int | str] = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        **settings,
    }
    request = ov.Core().compile_model(model, "CPU", options).create_infer_request()
    # The result stays in the request's memory, where the next layer would read it.
    return lambda x: torch.from_numpy(
        request.infer([x.numpy()], share_inputs=True, share_outputs=True)[0]
    )


def _scaled(codes: Tensor, kind: ov.Type, shape: list[int], scale: Tensor) -> ov.Node:
    # The constant copies: OpenVINO would otherwise read memory that Python has freed.
    constant = op.constant(ov.Tensor(codes.numpy(), ov.Shape(shape), kind), shared_memory=False)
    return op.multiply(op.convert(constant, "f16"), op.constant(scale.numpy().astype(np.float16)))


def _int4(weight: Tensor, copies: int) -> Sequence[Call]:
    n, k = weight.shape
    if k % _GROUP:
        raise ValueError(f"needs in_features in multiples of {_GROUP}")
    groups = weight.view(n, k // _GROUP, _GROUP)
    scale = groups.abs().amax(-1, keepdim=True) / 7.5
    codes = (groups / scale).round().clamp(-8, 7).to(torch.int8).view(torch.uint8) & 15
    packed = (codes[..., ::2] | codes[..., 1::2] << 4).contiguous()
    node = _scaled(packed, ov.Type.i4, [n, k // _GROUP, _GROUP], scale)
    return _compile(node, n, k, _GROUP, copies)


def _int8(weight: Tensor, copies: int) -> Sequence[Call]:
    n, k = weight.shape
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8)
    return _compile(_scaled(codes, ov.Type.i8, [n, k], scale), n, k, _GROUP, copies)


def _classifier(model: nn.Module, batches: Sequence[Tensor]) -> Call:
    def prepare(x: Tensor) -> Call:
        # A model for each batch size: with an open one it plans worse.
        fixed = read.clone()
        fixed.reshape(list(x.shape))
        return _request(fixed)

    with tempfile.TemporaryDirectory() as folder:
        read = ov.Core().read_model(write_static_int8(model, batches, Path(folder)))
    return by_shape(prepare)


def cnn_engines() -> list[CnnEngine]:
    return [CnnEngine("openvino static int8", "8 bits", _classifier)]


def linear_engines() -> list[LinearEngine]:
    def engine(
        name: str, kind: str, bits: float, build: Callable[[Tensor, int], Sequence[Call]]
    ) -> LinearEngine:
        return LinearEngine(f"openvino {name}", kind, torch.float32, bits, "", build)

    return [
        engine("int8", "8 bits", 8, _int8),
        engine(f"int4 g{_GROUP}", "4 bits", 4 + 16 / _GROUP, _int4),
    ]
