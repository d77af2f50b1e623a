"""Training in two stages: a head on frozen features, then the encoder's last layers with it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from qkernels.demo import loop
from qkernels.demo.data import Dataset, Example
from qkernels.demo.loop import progress_bar
from qkernels.demo.model import Batch, SentenceClassifier, Tokenizer

EVAL_BATCH = 64


def labels(examples: Sequence[Example]) -> Tensor:
    """Class indices of the examples, int64."""
    return torch.tensor([e.label for e in examples])


def embed_all(
    model: SentenceClassifier,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    advance: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """Sentence embeddings of all examples, in their order, (examples, features).

    Args:
        model: the classifier, whose dtype is the result's.
        tokenizer: makes its batches.
        examples: the texts.
        advance: told how many examples are done, after every batch.
    """
    texts = [e.text for e in examples]
    parts: list[Tensor] = []
    order: list[int] = []
    with torch.inference_mode():
        for chosen, batch in tokenizer.batches(texts, EVAL_BATCH):
            parts.append(model.embed(**batch))
            order.extend(chosen)
            advance(len(chosen))
    found = torch.cat(parts)
    result = torch.empty_like(found)
    result[torch.tensor(order)] = found
    return result


def accuracy(scores: Tensor, examples: Sequence[Example]) -> float:
    """Share of the examples whose highest score is at their label."""
    return (scores.argmax(1) == labels(examples)).float().mean().item()


def test_accuracy(
    model: SentenceClassifier, tokenizer: Tokenizer, examples: Sequence[Example]
) -> float:
    """Accuracy of the whole model on some examples."""
    with torch.inference_mode():
        return accuracy(model.head(embed_all(model, tokenizer, examples)), examples)


def train_head(
    model: SentenceClassifier,
    tokenizer: Tokenizer,
    data: Dataset,
    console: Console,
    steps: int = 300,
) -> None:
    """Stage 1: fit the head on the frozen encoder's features, which are computed once.

    Args:
        model: its head is trained in place.
        tokenizer: makes its batches.
        data: the training examples are used, all in every step.
        console: for the progress bar.
        steps: of Adam.
    """
    with progress_bar(console) as bar:
        task = bar.add_task("reading texts", total=len(data.train))
        found = embed_all(model, tokenizer, data.train, lambda count: bar.advance(task, count))
    features = found.clone()  # tensors made in inference mode cannot be trained on
    target = labels(data.train)
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=0.01, weight_decay=1.0)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model.head(features), target).backward()
        optimizer.step()


def fine_tune(
    model: SentenceClassifier,
    tokenizer: Tokenizer,
    data: Dataset,
    console: Console,
    seed: int,
    layers: int = 3,
    epochs: int = 3,
    batch_size: int = 32,
    lr: float = 1e-4,
) -> None:
    """Stage 2: train the encoder's last layers and the head, keeping the best epoch.

    The layers below stay frozen and run without a graph, which saves a third of the time.

    Args:
        model: trained in place; in eval mode and without gradients afterwards.
        tokenizer: makes its batches.
        data: training examples; the validation examples choose the epoch that is kept.
        console: for the progress bar.
        seed: order of the batches and dropout.
        layers: how many of the encoder's last layers to train.
        epochs: passes over the training examples.
        batch_size: texts per step.
        lr: highest learning rate; it warms up over a tenth of the steps, then falls to zero.
    """
    model.requires_grad_(False)
    trained: list[nn.Module] = [*list(model.layers)[len(model.layers) - layers :], model.head]
    for module in trained:
        module.requires_grad_(True)
    fit(model, trained, tokenizer, data, console, seed, epochs, batch_size, lr)
    model.requires_grad_(False)


def fit(
    model: SentenceClassifier,
    trained: Sequence[nn.Module],
    tokenizer: Tokenizer,
    data: Dataset,
    console: Console,
    seed: int,
    epochs: int = 3,
    batch_size: int = 32,
    lr: float = 1e-4,
    groups: Sequence[dict[str, Any]] | None = None,
    penalty: Callable[[], Tensor] | None = None,
) -> None:
    """Train whatever of a model requires a gradient, keeping the best epoch.

    Args:
        model: trained in place; in eval mode afterwards.
        trained: the modules that are in train mode meanwhile.
        tokenizer: makes its batches.
        data: training examples; the validation examples choose the epoch that is kept.
        console: for the progress bar.
        seed: order of the batches and dropout.
        epochs: passes over the training examples.
        batch_size: texts per step.
        lr: highest learning rate; it warms up over a tenth of the steps, then falls to zero.
        groups: the optimizer's parameter groups with rates of their own, instead of one for all.
        penalty: what to add to the loss.
    """
    texts = [e.text for e in data.train]
    target = labels(data.train)
    made = list(tokenizer.batches(texts, batch_size))

    def batches(rng: random.Random) -> list[tuple[list[int], Batch]]:
        rng.shuffle(made)
        return made

    def loss_of(batch: tuple[list[int], Batch]) -> Tensor:
        chosen, inputs = batch
        loss = F.cross_entropy(model(**inputs), target[chosen], label_smoothing=0.05)
        return loss if penalty is None else loss + penalty()

    def score() -> float:
        return test_accuracy(model, tokenizer, data.val)

    loop.train(model, trained, batches, loss_of, score, console, seed, epochs, lr, groups)
