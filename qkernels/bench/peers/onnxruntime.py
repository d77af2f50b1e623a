"""onnxruntime: dynamic int8, and MatMulNBits with int8 activations (accuracy level 4)."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from qkernels.bench.engines import Call, CnnEngine, LinearEngine, ModelEngine
from qkernels.bench.peers.qdq import write_static_int8

onnxruntime.set_default_logger_severity(3)


def session_options() -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    return options


def _sessions(
    node: Any, constants: dict[str, Tensor], weight: Tensor, copies: int
) -> Sequence[Call]:
    n, k = weight.shape
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])],
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()

    def one() -> Call:
        session = onnxruntime.InferenceSession(
            model, session_options(), providers=["CPUExecutionProvider"]
        )
        return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

    return [one() for _ in range(copies)]


def _dynamic_int8(weight: Tensor, copies: int) -> Sequence[Call]:
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale[:, None]).round().to(torch.int8).T.contiguous()
    node = helper.make_node(
        "DynamicQuantizeMatMul", ["x", "codes", "scale"], ["y"], domain="com.microsoft"
    )
    return _sessions(node, {"codes": codes, "scale": scale}, weight, copies)


def _n_bits(bits: int, group: int) -> Callable[[Tensor, int], Sequence[Call]]:
    def build(weight: Tensor, copies: int) -> Sequence[Call]:
        n, k = weight.shape
        if k % group:
            raise ValueError(f"needs in_features in multiples of {group}")
        half = 2 ** (bits - 1)
        groups = weight.view(n, k // group, group)
        scale = groups.abs().amax(-1) / (half - 0.5)
        codes = (groups / scale[..., None]).round().clamp(-half, half - 1) + half
        codes = codes.to(torch.uint8)
        if bits == 4:
            codes = codes[..., ::2] | codes[..., 1::2] << 4
        node = helper.make_node(
            "MatMulNBits",
            ["x", "codes", "scale"],
            ["y"],
            domain="com.microsoft",
            K=k,
            N=n,
            bits=bits,
            block_size=group,
            accuracy_level=4,  # activations in int8
        )
        constants = {"codes": codes.contiguous(), "scale": scale.reshape(-1)}
        return _sessions(node, constants, weight, copies)

    return build


def linear_engines() -> list[LinearEngine]:
    engines = [LinearEngine("onnxruntime int8", "8 bits", torch.float32, 8, "int8", _dynamic_int8)]
    for bits, kind, arithmetic in ((8, "8 bits", "int8"), (4, "4 bits", "int4")):
        for group in (32, 128):
            engines.append(
                LinearEngine(
                    f"onnxruntime int{bits} g{group}",
                    kind,
                    torch.float32,
                    bits + 32 / group,
                    arithmetic,
                    _n_bits(bits, group),
                )
            )
    return engines


class _Encoder:
    """An exported encoder with int8 products, called like the model that it came from."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        given = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        return SimpleNamespace(
            last_hidden_state=torch.from_numpy(self._session.run(None, given)[0])
        )


class _Exported(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def _encoder(model: Any) -> _Encoder:
    """Export, fuse attention and layer norms, quantize dynamically."""
    if getattr(model.config, "model_type", "") != "bert":
        raise ValueError("its fusions are for BERT-like encoders")
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers.optimizer import optimize_model

    # The form of attention that the fusion knows.
    model.set_attn_implementation("eager")
    ids = torch.ones(2, 16, dtype=torch.int64)
    axes = {0: "batch", 1: "tokens"}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported, fused, quantized = (f"{folder}/{name}.onnx" for name in ("a", "b", "c"))
        torch.onnx.export(
            _Exported(model),
            (ids, ids),
            exported,
            dynamo=False,
            opset_version=17,
            input_names=["input_ids", "attention_mask"],
            output_names=["y"],
            dynamic_axes={"input_ids": axes, "attention_mask": axes},
        )
        optimize_model(
            exported,
            model_type="bert",
            num_heads=model.config.num_attention_heads,
            hidden_size=model.config.hidden_size,
        ).save_model_to_file(fused)
        quantize_dynamic(
            fused,
            quantized,
            weight_type=QuantType.QInt8,
            per_channel=True,
            extra_options={"DefaultTensorType": TensorProto.FLOAT, "MatMulConstBOnly": True},
        )
        return _Encoder(
            onnxruntime.InferenceSession(
                quantized, session_options(), providers=["CPUExecutionProvider"]
            )
        )


def _classifier(model: nn.Module, batches: Sequence[Tensor]) -> Call:
    with tempfile.TemporaryDirectory() as folder:
        session = onnxruntime.InferenceSession(
            write_static_int8(model, batches, Path(folder)),
            session_options(),
            providers=["CPUExecutionProvider"],
        )
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def cnn_engines() -> list[CnnEngine]:
    return [CnnEngine("onnxruntime static int8", "8 bits", _classifier)]


def model_engines() -> list[ModelEngine]:
    return [ModelEngine("onnxruntime int8 fused", "8 bits", _encoder)]
