"""OpenVINO: a MatMul with a compressed int8 or int4 weight, activations quantized dynamically."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as op
from torch import Tensor

from qkernels.bench.engines import Call, LinearEngine

_GROUP = 128


def _compile(weight: ov.Node, n: int, k: int, group: int, copies: int) -> Sequence[Call]:
    x = op.parameter([-1, k], ov.Type.f32, name="x")
    matrix = op.convert(op.reshape(weight, np.array([n, k]), False), "f32")
    model = ov.Model([op.matmul(x, matrix, False, True)], [x], "linear")
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": group,
    }

    def one() -> Call:
        request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
        # The result stays in the request's memory, where the next layer would read it.
        return lambda x: torch.from_numpy(
            request.infer([x.numpy()], share_inputs=True, share_outputs=True)[0]
        )

    return [one() for _ in range(copies)]


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


def linear_engines() -> list[LinearEngine]:
    def engine(
        name: str, kind: str, bits: float, build: Callable[[Tensor, int], Sequence[Call]]
    ) -> LinearEngine:
        return LinearEngine(f"openvino {name}", kind, torch.float32, bits, "", build)

    return [
        engine("int8", "8 bits", 8, _int8),
        engine(f"int4 g{_GROUP}", "4 bits", 4 + 16 / _GROUP, _int4),
    ]
