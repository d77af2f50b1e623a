"""What `qk.lower` keeps of ResNet-50, and how fast it is, beside ONNX Runtime's static int8.

    python benchmarks/lowering.py                       # prints; about fifteen minutes on two cores
    python benchmarks/lowering.py --output FOLDER       # also writes lowering.json and lowering.md
    python benchmarks/lowering.py --parts latency       # only the times; on a quiet machine

The network is ResNet-50 as transformers configures it, with weights as they are initialized and
BatchNorm statistics from forward passes in training mode. Images are smoothed noise. Everyone
calibrates on the same 32 images and is compared with the float model on 16 others: SQNR is
10·log10(Σ y² / Σ (y - ŷ)²) over the logits. ONNX Runtime's models come from `quantize_static` with
QDQ, a scale for each channel of a weight, and uint8 activations, after its own pre-processing.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qkernels as qk
from qkernels.report.files import write_atomically
from qkernels.report.machine import machine_facts
from qkernels.timing import interleave

CALIBRATION, TEST, BATCH, SIZE = 32, 16, 8, 224
OBSERVERS = ("mse", "minmax", "histogram", "percentile")
LATENCY_BATCHES = (1,)
LOWERED = "lowered.safetensors"
ORT_METHODS = ("MinMax", "Percentile", "Entropy")


def images(count: int, seed: int) -> Tensor:
    """Noise of several sizes, so that neighbours are alike as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(count, 3, SIZE, SIZE)
    for size, weight in ((4, 1.0), (16, 0.7), (64, 0.4), (SIZE, 0.2)):
        noise = torch.randn(count, 3, size, size, generator=generator)
        total += weight * F.interpolate(noise, size=(SIZE, SIZE), mode="bilinear")
    return total


class Logits(nn.Module):
    """A classifier of transformers that returns its logits as a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits = self.model(pixel_values=pixel_values, return_dict=True).logits
        assert isinstance(logits, Tensor)
        return logits


def resnet50(passes: int = 4) -> nn.Module:
    """The float model, with the statistics that forward passes leave in its BatchNorms."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(num_labels=1000))
    with torch.no_grad():
        for seed in range(passes):
            model(images(BATCH, 1000 + seed))
    return Logits(model).eval()


def sqnr(expected: Tensor, got: Tensor) -> float:
    noise = (expected.double() - got.double()).square().sum()
    return 10 * math.log10(float(expected.double().square().sum() / noise))


def answers(model: Callable[[Tensor], Tensor], test: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(batch) for batch in test.split(BATCH)])


# ---- ONNX Runtime --------------------------------------------------------------------------------


class _Reader:
    """Calibration data as ONNX Runtime asks for it."""

    def __init__(self, batches: tuple[Tensor, ...]) -> None:
        self._batches: Iterator[Tensor] = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"x": batch.numpy()}


def export_onnx(model: nn.Module, folder: Path) -> Path:
    """The float model as ONNX, pre-processed as `quantize_static` wants it."""
    from onnxruntime.quantization import shape_inference

    plain, ready = folder / "float.onnx", folder / "ready.onnx"
    if ready.exists():
        return ready
    torch.onnx.export(
        copy.deepcopy(model),
        (images(2, 0),),
        plain,
        input_names=["x"],
        dynamic_axes={"x": {0: "batch"}},
        dynamo=False,
    )
    shape_inference.quant_pre_process(plain, ready)
    return ready


def quantize_onnx(ready: Path, method: str, batches: tuple[Tensor, ...]) -> Path:
    from onnxruntime import quantization as ort

    target = ready.with_name(f"{method}.onnx")
    if target.exists():
        return target
    reader: Any = _Reader(batches)
    ort.quantize_static(
        ready,
        target,
        reader,
        quant_format=ort.QuantFormat.QDQ,
        per_channel=True,
        activation_type=ort.QuantType.QUInt8,
        weight_type=ort.QuantType.QInt8,
        calibrate_method=getattr(ort.CalibrationMethod, method),
    )
    return target


def onnx_session(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would go on spinning, on the cores that the others' turns need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(np.asarray(session.run(None, {"x": x.numpy()})[0]))


# ---- The measurements ----------------------------------------------------------------------------


class Accuracy:
    """Rows of SQNR, each printed as it comes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.batches, self.test = images(CALIBRATION, 1).split(BATCH), images(TEST, 2)
        self.expected = answers(model, self.test)
        self.rows: list[dict[str, Any]] = []

    def add(self, what: str, ranges: str, quantized: Callable[[Tensor], Tensor]) -> None:
        got = answers(quantized, self.test)
        agrees = float((got.argmax(1) == self.expected.argmax(1)).float().mean())
        row = {"what": what, "ranges": ranges, "sqnr_db": sqnr(self.expected, got)}
        self.rows.append({**row, "agrees": agrees})
        print(self.rows[-1], flush=True)


def own_accuracy(model: nn.Module, activation: str) -> list[dict[str, Any]]:
    accuracy = Accuracy(model)
    scheme = qk.W8A8(static=True, activation=activation)
    batches = accuracy.batches
    for observer in OBSERVERS:
        lowered = qk.lower(model, batches[0], batches=batches, observer=observer, scheme=scheme)
        accuracy.add(f"qkernels {activation}", observer, lowered)
    return accuracy.rows


def onnx_accuracy(model: nn.Module, folder: Path) -> list[dict[str, Any]]:
    accuracy = Accuracy(model)
    ready = export_onnx(model, folder)
    for method in ORT_METHODS:
        quantized = onnx_session(quantize_onnx(ready, method, accuracy.batches))
        accuracy.add("ONNX Runtime", method.lower(), quantized)
    return accuracy.rows


def latency(model: nn.Module, folder: Path, seconds: float) -> list[dict[str, Any]]:
    ready = export_onnx(model, folder)
    stored = folder / LOWERED
    batches: tuple[Tensor, ...] = ()
    if not stored.exists():
        batches = images(CALIBRATION, 1).split(BATCH)
        made = qk.lower(model, batches[0], batches=batches, observer="minmax")
        qk.save_model(made, stored)
    lowered = qk.load_lowered(stored)
    half = copy.deepcopy(model).bfloat16().to(memory_format=torch.channels_last)
    wide = copy.deepcopy(model).to(memory_format=torch.channels_last)
    peer = onnx_session(quantize_onnx(ready, "MinMax", batches))
    peer_float = onnx_session(ready)
    rows = []
    for count in LATENCY_BATCHES:
        x = images(count, 3)
        last = x.contiguous(memory_format=torch.channels_last)
        contenders: dict[str, Callable[[], object]] = {
            "torch float32": lambda x=last: wide(x),
            "torch bfloat16": lambda x=last: half(x.bfloat16()),
            "qkernels int8": lambda x=x: lowered(x),
            "ONNX Runtime float32": lambda x=x: peer_float(x),
            "ONNX Runtime int8": lambda x=x: peer(x),
        }
        with torch.inference_mode():
            times = interleave(contenders, warmup=2, min_rounds=5, max_rounds=60, budget=seconds)
        rows += [{"what": w, "batch": count, **timing.to_dict()} for w, timing in times.items()]
    for shown in rows:
        print(shown, flush=True)
    return rows


PARTS: dict[str, Callable[[nn.Module, Path, float], list[dict[str, Any]]]] = {
    "asymmetric": lambda model, folder, seconds: own_accuracy(model, "asymmetric"),
    "symmetric": lambda model, folder, seconds: own_accuracy(model, "symmetric"),
    "onnx": lambda model, folder, seconds: onnx_accuracy(model, folder),
    "latency": latency,
}


# ---- Output --------------------------------------------------------------------------------------


def markdown(result: dict[str, Any]) -> str:
    parts = result["parts"]
    lines = [
        "# ResNet-50 in int8",
        "",
        "SQNR of the logits against the float model, in dB, and test images with the same first "
        "class:",
        "",
        "| | ranges | SQNR | agrees |",
        "| --- | --- | ---: | ---: |",
    ]
    for part in ("asymmetric", "symmetric", "onnx"):
        lines += [
            f"| {r['what']} | {r['ranges']} | {r['sqnr_db']:.1f} | {r['agrees']:.0%} |"
            for r in parts.get(part, ())
        ]
    lines += ["", "Latency in ms:", "", "| | batch | median | least | middle half |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    lines += [
        f"| {r['what']} | {r['batch']} | {1000 * r['median_s']:.1f} | {1000 * r['min_s']:.1f} | "
        f"{1000 * r['iqr_s']:.1f} |"
        for r in parts.get("latency", ())
    ]
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    return "\n".join([*lines, "", f"Measured on {machine}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder for lowering.json and lowering.md")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--cache", type=Path, help="folder to keep and reuse quantized models in")
    parser.add_argument("--seconds", type=float, default=10.0, help="per batch size, for times")
    args = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    # The values of a float model do not matter to its time.
    made_before = args.cache is not None and (args.cache / LOWERED).exists()
    model = resnet50(0 if args.parts == ["latency"] and made_before else 4)
    kept = args.output / "lowering.json" if args.output else None
    result: dict[str, Any] = {"parts": {}}
    if kept is not None and kept.exists():
        result = json.loads(kept.read_text())
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.cache or Path(temporary)
        for part in args.parts:
            result["parts"][part] = PARTS[part](model, folder, args.seconds)
    result["machine"] = machine_facts()
    print(markdown(result))
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        write_atomically(args.output / "lowering.json", json.dumps(result, indent=1) + "\n")
        write_atomically(args.output / "lowering.md", markdown(result))


if __name__ == "__main__":
    main()
