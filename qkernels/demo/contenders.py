"""The models that the demo measures: float32, bfloat16, torch.ao's int8 and every scheme."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping

import torch
from torch import nn

import qkernels as qk
from qkernels.demo.model import SentenceClassifier

REFERENCE = "float32"
SCHEMES: tuple[qk.Scheme, ...] = (
    qk.W8A8(),
    qk.W8A16(),
    qk.W4A16(group_size=32),
    qk.W4A8(group_size=32),
    qk.NF4(group_size=64),
)
# The head stays float: it is a thousandth of the weights, and nothing after it evens out errors.
IGNORE = ("head",)
# Rows of the embedding tables are read as they are, so 4 bits would hurt them most; 8 bits do not.
EMBEDDINGS = qk.W8A16()


def label(scheme: qk.Scheme) -> str:
    """Short name of a scheme for tables and files.

    Example:
        >>> label(qk.W4A16(group_size=32))
        'W4A16 g32'
    """
    group = "" if scheme.group_size == -1 else f" g{scheme.group_size}"
    return type(scheme).__name__ + group


def quantized(
    model: SentenceClassifier, scheme: qk.Scheme
) -> tuple[SentenceClassifier, qk.Summary]:
    """A copy of the model whose encoder is quantized.

    Args:
        model: the float model, which stays as it is.
        scheme: for its linear layers.

    Returns:
        The copy, and what became of each of its modules.
    """
    result = copy.deepcopy(model)
    summary = qk.quantize_(result, {"*": scheme, "*.embeddings": EMBEDDINGS}, ignore=IGNORE)
    return result, summary


def torch_ao_int8(model: SentenceClassifier) -> SentenceClassifier | str:
    """A copy quantized by PyTorch's own dynamic int8 quantization, or why there is none."""
    result = copy.deepcopy(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated, as its users know
            from torch.ao.quantization import quantize_dynamic

            result.encoder = quantize_dynamic(result.encoder, {nn.Linear}, dtype=torch.qint8)
    except (ImportError, RuntimeError, NotImplementedError) as error:
        return f"torch.ao dynamic int8 is left out: {str(error).splitlines()[0]}"
    return result


def contenders(
    model: SentenceClassifier, by_scheme: Mapping[str, SentenceClassifier]
) -> tuple[dict[str, SentenceClassifier], list[str]]:
    """All models by name, the float32 reference first, and sentences on what is missing.

    Args:
        model: the fine-tuned float32 model.
        by_scheme: its quantized copies.
    """
    found = {REFERENCE: model, "bfloat16": copy.deepcopy(model).bfloat16()}
    missing = []
    peer = torch_ao_int8(model)
    if isinstance(peer, str):
        missing.append(peer)
    else:
        found["torch.ao int8"] = peer
    return {**found, **by_scheme}, missing
