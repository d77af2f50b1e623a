"""A classifier as an ONNX file with int8 operators, as onnxruntime and OpenVINO read it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def write_static_int8(model: nn.Module, batches: Sequence[Tensor], folder: Path) -> Path:
    """Export a model and quantize it with onnxruntime's tools, by their documented steps.

    Operators stand between QuantizeLinear and DequantizeLinear; weights are int8 with a scale for
    each channel, activations uint8.

    Args:
        model: takes and gives one tensor; batch norms are folded into the layers before them.
        batches: to calibrate with; the first dimension may vary later.
        folder: where to.

    Returns:
        The path of the quantized file.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    exported, prepared, quantized = (folder / f"{name}.onnx" for name in ("a", "b", "c"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (batches[0],),
            str(exported),
            dynamo=False,
            opset_version=17,
            input_names=["x"],
            output_names=["y"],
            dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}},
        )
        quant_pre_process(str(exported), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(quantized),
            _Reader(batches),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    return quantized


class _Reader:
    """onnxruntime's `CalibrationDataReader`, which asks for no more than this."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self._given: Iterator[Tensor] = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        x = next(self._given, None)
        return None if x is None else {"x": x.numpy()}
