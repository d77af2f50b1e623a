"""Post-training quantization with calibration data: GPTQ, AWQ, SmoothQuant, bias correction."""

from qkernels.ptq.run import quantize_calibrated_

__all__ = ["quantize_calibrated_"]
