"""Running sums over batches: signal and noise power, cosine, agreement. No activation is kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements that are converted to float64 at a time: 2 MiB, which a cache holds from pass to pass.
_CHUNK = 1 << 18


@dataclass
class Noise:
    """Signal and noise power of an output against its reference, summed in float64.

    Positions where either side is NaN or Inf are counted and left out of the sums.
    """

    signal: float = 0.0
    noise: float = 0.0
    max_abs_error: float = 0.0
    values: int = 0
    nonfinite: int = 0
    nonfinite_reference: int = 0

    def add(self, output: Tensor, reference: Tensor) -> None:
        """Add one pair of tensors of the same shape."""
        outputs = torch.split(output.detach().reshape(-1), _CHUNK)
        references = torch.split(reference.detach().to(output.device).reshape(-1), _CHUNK)
        for out, ref in zip(outputs, references, strict=True):
            ref64 = ref.double()
            error = out.double().sub_(ref64)
            squared = float(torch.dot(error, error))
            if not math.isfinite(squared):
                # NaN or Inf in, or a finite value beyond 1e154: look at the positions one by one.
                good = torch.isfinite(out)
                good_reference = torch.isfinite(ref)
                self.nonfinite += good.numel() - int(good.sum())
                self.nonfinite_reference += good.numel() - int(good_reference.sum())
                both = good & good_reference
                ref64, error = ref64[both], error[both]
                squared = float(torch.dot(error, error))
            self.signal += float(torch.dot(ref64, ref64))
            self.noise += squared
            self.values += error.numel()
            if error.numel():
                low, high = torch.aminmax(error)
                self.max_abs_error = max(self.max_abs_error, -float(low), float(high))

    @property
    def sqnr_db(self) -> float | None:
        """10·log10(signal / noise) in dB: inf for identical outputs, None if nothing was added."""
        if self.values == 0:
            return None
        if self.noise == 0.0:
            return math.inf
        if self.signal == 0.0:
            return -math.inf
        return 10.0 * math.log10(self.signal / self.noise)


@dataclass
class RowStatistics:
    """Cosine and, where asked for, argmax agreement of output rows.

    Rows with NaN or Inf on either side are counted and left out of the cosine; for the agreement
    they count as a disagreement, since no prediction can be read from them.
    """

    rows: int = 0
    nonfinite: int = 0
    nonfinite_reference: int = 0
    cosine_sum: float = 0.0
    cosine_count: int = 0
    cosine_min: float = math.inf
    predictions: int = 0
    agreeing: int = 0

    def add(self, output: Tensor, reference: Tensor, *, agreement: bool) -> None:
        """Add one pair of outputs of the same shape, [..., features] or [N, C, ...]."""
        reference = reference.to(output.device)
        out = as_rows(output).double()
        ref = as_rows(reference).double()
        good_out = torch.isfinite(out).all(dim=1)
        good_ref = torch.isfinite(ref).all(dim=1)
        both = good_out & good_ref
        self.rows += out.shape[0]
        self.nonfinite += out.shape[0] - int(good_out.sum())
        self.nonfinite_reference += out.shape[0] - int(good_ref.sum())
        if bool(both.any()):
            cosine = _cosine(out[both], ref[both])
            self.cosine_sum += float(cosine.sum())
            self.cosine_count += cosine.numel()
            self.cosine_min = min(self.cosine_min, float(cosine.min()))
        if agreement:
            dim = class_dim(output)
            finite = torch.isfinite(output).all(dim=dim) & torch.isfinite(reference).all(dim=dim)
            same = (output.argmax(dim=dim) == reference.argmax(dim=dim)) & finite
            self.predictions += same.numel()
            self.agreeing += int(same.sum())

    @property
    def cosine_mean(self) -> float | None:
        return self.cosine_sum / self.cosine_count if self.cosine_count else None

    @property
    def agreement(self) -> float | None:
        return self.agreeing / self.predictions if self.predictions else None


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of each pair of rows; 1 where both are zero, 0 where one is."""
    # Dividing by the largest magnitude first keeps the squares of tiny and huge rows in range.
    a = a / a.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)
    b = b / b.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(b.dtype).tiny)
    norm_a, norm_b = a.norm(dim=1), b.norm(dim=1)
    cosine = (a * b).sum(dim=1) / (norm_a * norm_b)
    both_zero = (norm_a == 0) & (norm_b == 0)
    return torch.where(both_zero, 1.0, torch.nan_to_num(cosine, nan=0.0)).clamp(-1.0, 1.0)


def as_rows(tensor: Tensor) -> Tensor:
    """The vectors that are compared: along the last dimension up to rank 3, else one per sample."""
    if tensor.dim() <= 1:
        return tensor.reshape(1, -1)
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() <= 3 else tensor.flatten(1)


def class_dim(tensor: Tensor) -> int:
    """Where the classes are: the last dimension up to rank 3, dimension 1 of images and volumes."""
    return -1 if tensor.dim() <= 3 else 1


def looks_like_logits(name: str, reference: Tensor) -> bool:
    """Whether an argmax over the output means a prediction.

    `logits` of a Hugging Face model do, its hidden states do not. A plain tensor [..., classes] is
    taken for logits unless its rows all have length one, which marks embeddings.
    """
    if tensor_has_no_choice(reference) or name in ("last_hidden_state", "pooler_output"):
        return False
    if name == "logits":
        return True
    lengths = as_rows(reference).float().norm(dim=1)
    return not torch.allclose(lengths, torch.ones_like(lengths), atol=1e-2)


def tensor_has_no_choice(tensor: Tensor) -> bool:
    """True if the output has no dimension with at least two classes."""
    return tensor.dim() < 2 or tensor.shape[class_dim(tensor)] < 2
