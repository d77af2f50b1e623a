"""Low-bit layers for PyTorch that really compute in integers: int8, int4 and NF4 on the CPU.

Example:
    >>> import torch
    >>> import qkernels as qk
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU())
    >>> summary = qk.quantize_(model, qk.W8A8())
    >>> model(torch.randn(2, 64)).shape
    torch.Size([2, 32])
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

try:
    import torch
except ModuleNotFoundError as missing:
    raise ImportError(
        "qkernels needs torch >= 2.10, which is not installed here; install it as "
        "https://pytorch.org/get-started says and try again"
    ) from missing

try:
    from qkernels import _C
except ImportError as failure:
    # Kept for whoever asks for a name: `qkernels doctor` has to run without the library.
    _PROBLEM = (
        "qkernels' compiled library (qkernels._C) is missing or does not load with torch "
        f"{torch.__version__}: {failure}. It needs torch >= 2.10 on Linux x86-64 and the Python "
        "version that it was built for; `pip install --force-reinstall --no-deps qkernels` brings "
        "a fitting one, and `pip install .` in a checkout builds it"
    )
    from qkernels.doctor import doctor
else:
    _PROBLEM = ""
    from qkernels import _cuda as _cuda
    from qkernels import calibration, functional, int8, io, nn, optimize, qat
    from qkernels import ops as ops
    from qkernels import ops_conv as ops_conv
    from qkernels import ops_int8 as ops_int8
    from qkernels import ops_sequence as ops_sequence
    from qkernels import ops_transformer as ops_transformer
    from qkernels.attention import split_attention_
    from qkernels.calibrate import calibrate
    from qkernels.calibration import Calibration
    from qkernels.doctor import doctor
    from qkernels.explain import explain
    from qkernels.fold import fold_batchnorm_
    from qkernels.functional import Quantized
    from qkernels.fuse import fuse_, unfuse_
    from qkernels.io import load_model, save_model
    from qkernels.qat import convert_, prepare_qat_
    from qkernels.quantize import dequantize_, quantize_
    from qkernels.schemes import NF4, W4A8, W4A16, W8A8, W8A16, Scheme
    from qkernels.summary import Summary

    # The module of the same name, imported above, had taken its place.
    quantize = functional.quantize

if TYPE_CHECKING:
    from qkernels import transfer
    from qkernels.lowering import LoweredModel, load_lowered, lower
    from qkernels.mixed.plan import PrecisionPlan
    from qkernels.mixed.search import search
    from qkernels.ptq import quantize_calibrated_
    from qkernels.report import Report, compare

# Imported when they are first used: most programs need none of them.
_LAZY = {
    "PrecisionPlan": "qkernels.mixed.plan",
    "LoweredModel": "qkernels.lowering",
    "Report": "qkernels.report",
    "compare": "qkernels.report",
    "load_lowered": "qkernels.lowering",
    "lower": "qkernels.lowering",
    "quantize_calibrated_": "qkernels.ptq",
    "search": "qkernels.mixed.search",
}
_LAZY_MODULES = ("transfer",)

__all__ = [
    "Calibration",
    "LoweredModel",
    "NF4",
    "PrecisionPlan",
    "Quantized",
    "Report",
    "Scheme",
    "Summary",
    "W4A8",
    "W4A16",
    "W8A8",
    "W8A16",
    "calibrate",
    "calibration",
    "compare",
    "convert_",
    "dequantize_",
    "doctor",
    "explain",
    "fold_batchnorm_",
    "functional",
    "fuse_",
    "int8",
    "io",
    "load_lowered",
    "load_model",
    "lower",
    "nn",
    "optimize",
    "prepare_qat_",
    "qat",
    "quantize",
    "quantize_",
    "quantize_calibrated_",
    "save_model",
    "search",
    "split_attention_",
    "transfer",
    "unfuse_",
]


def __getattr__(name: str) -> Any:
    if _PROBLEM and name in __all__:
        raise ImportError(_PROBLEM)
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    elif name in _LAZY_MODULES:
        value = importlib.import_module(f"qkernels.{name}")
    elif name == "__version__":
        value = _version()
    else:
        # With these two, Python names what is spelled alike.
        message = f"module 'qkernels' has no attribute {name!r}"
        raise AttributeError(message, name=name, obj=sys.modules[__name__])
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("qkernels")
    except PackageNotFoundError:  # run from a checkout that was built in place
        return "unknown" if _PROBLEM else _C.build_info()["version"]
