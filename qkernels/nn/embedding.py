"""QEmbedding: `nn.Embedding` on a packed quantized table."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qkernels import functional
from qkernels.nn.carry import carry_over, why_not_quantizable, why_not_replaceable
from qkernels.nn.module import QModule
from qkernels.nn.storage import quantize_weight
from qkernels.schemes import W8A16, Scheme

_DEFAULT_SCHEME = W8A16()


class QEmbedding(QModule):
    """`nn.Embedding` with a quantized, frozen table.

    The table's bytes are those that QLinear reads, so a tied embedding and output layer can share
    one `packed` parameter. Of the scheme only the weight's part matters.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: columns of the table.
        padding_idx: row that is drawn as zeros; negative counts from the end.
        max_norm: must be None, a frozen table cannot be renormalized.
        norm_type: taken for nn.Embedding's sake, without effect.
        scale_grad_by_freq: taken for nn.Embedding's sake, without effect on a frozen table.
        sparse: taken for nn.Embedding's sake, without effect on a frozen table.
        scheme: how the table is stored.
        device: "cpu", "cuda", or "meta" for a module that is filled by loading.
        dtype: of the result.

    Raises:
        TypeError: scheme is not a Scheme, or dtype is not floating.
        ValueError: max_norm is given, or padding_idx is out of range.

    Example:
        >>> table = qk.nn.QEmbedding(100, 16, scheme=qk.W4A16(group_size=16))
        >>> table(torch.tensor([3, 7])).shape
        torch.Size([2, 16])
    """

    ops = ("pack", "unpack", "embedding")

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        scheme: Scheme = _DEFAULT_SCHEME,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, scheme, device, dtype)
        if max_norm is not None:
            raise ValueError(
                f"QEmbedding: max_norm is {max_norm}; expected None, since a quantized table is "
                "frozen and cannot be renormalized while it runs"
            )
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(
                f"QEmbedding: padding_idx is {padding_idx}; expected one of the "
                f"{num_embeddings} rows, or None"
            )
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.reset_parameters()

    @classmethod
    @torch.inference_mode(False)  # what is made must be usable outside of it
    def from_float(cls, embedding: nn.Embedding, scheme: Scheme = _DEFAULT_SCHEME) -> QEmbedding:
        """A quantized embedding with the table of a float one; it keeps mode, dtype and hooks.

        Args:
            embedding: an `nn.Embedding` on the CPU or a GPU, where the new one will be too.
            scheme: how to quantize it.

        Raises:
            TypeError: not an `nn.Embedding`, or a subclass with a forward of its own.
            ValueError: the layer cannot be replaced or quantized.

        Example:
            >>> qk.nn.QEmbedding.from_float(nn.Embedding(10, 4), qk.W8A16()).num_embeddings
            10
        """
        if (
            not isinstance(embedding, nn.Embedding)
            or type(embedding).forward is not nn.Embedding.forward
        ):
            raise TypeError(
                f"QEmbedding.from_float: got {type(embedding).__name__}; expected an nn.Embedding, "
                "with the forward of nn.Embedding"
            )
        reason = why_not_replaceable(embedding) or why_not_quantizable(embedding.weight)
        if reason is not None:
            raise ValueError(f"QEmbedding.from_float: the layer cannot be quantized: {reason}")
        new = cls.shell(embedding, scheme)
        new.packed = new.packing.parameter(quantize_weight(embedding.weight, scheme))
        return new

    @classmethod
    def shell(cls, embedding: nn.Embedding, scheme: Scheme) -> QEmbedding:
        """Everything of `from_float` but the table: `packed` is on the meta device.

        Args:
            embedding: an `nn.Embedding` on any device.
            scheme: how its table is going to be quantized.
        """
        sizes = (embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx)
        new = cls(*sizes, scheme=scheme, device="meta", dtype=embedding.weight.dtype)
        carry_over(embedding, new)
        return new

    def reset_parameters(self) -> None:
        """Draw the table as `nn.Embedding` does, and quantize it."""
        like = nn.Embedding(
            self.num_embeddings,
            self.embedding_dim,
            self.padding_idx,
            device=self.packed.device,
            dtype=self.dtype,
        )
        self.set_weight(like.weight)

    def dequantize(self) -> nn.Embedding:
        """The float embedding that this one looks up in: it keeps mode, dtype and hooks.

        Example:
            >>> qk.nn.QEmbedding(10, 4).dequantize()
            Embedding(10, 4)
        """
        new = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        new.weight = nn.Parameter(self.float_weight())
        carry_over(self, new, self.own_attributes)
        return new

    def forward(self, indices: Tensor) -> Tensor:
        try:
            return functional.embedding(
                indices,
                self.packed,
                layout=self.layout,
                num_embeddings=self.num_embeddings,
                embedding_dim=self.embedding_dim,
                group_size=self.scheme.group_size,
                dtype=self.dtype,
            )
        except RuntimeError as error:
            raise self._named(error) from None

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return (
            f"{self.num_embeddings}, {self.embedding_dim}{padding}, scheme={self.scheme}, "
            f"dtype={self.dtype}"
        )
