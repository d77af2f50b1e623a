"""The training loop that the demos share: AdamW, a warm-up, and the best epoch is kept."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

T = TypeVar("T")


def progress_bar(console: Console) -> Progress:
    """A bar with a description, the count, the time passed and the time to go."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def train(
    model: nn.Module,
    trained: Sequence[nn.Module],
    batches: Callable[[random.Random], Sequence[T]],
    loss_of: Callable[[T], Tensor],
    score: Callable[[], float],
    console: Console,
    seed: int,
    epochs: int,
    lr: float,
    groups: Sequence[dict[str, Any]] | None = None,
    after_step: Callable[[], None] | None = None,
) -> None:
    """Train whatever of a model requires a gradient, keeping the best epoch.

    Args:
        model: trained in place; in eval mode afterwards.
        trained: the modules that are in train mode meanwhile.
        batches: gives the batches of an epoch, as many each time.
        loss_of: the loss of a batch.
        score: validation accuracy of the model as it is; the best epoch is kept, which may be none.
        console: for the progress bar and a line for each epoch.
        seed: order of the batches and dropout.
        epochs: passes over the training examples.
        lr: highest learning rate; it warms up over a tenth of the steps, then falls to zero.
        groups: the optimizer's parameter groups with rates of their own, instead of one for all.
        after_step: called after each step of the optimizer.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(groups or parameters, lr=lr, weight_decay=0.01)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    best, kept = score(), _copies(model)
    todo = batches(rng)
    total = epochs * len(todo)
    warm = max(1, total // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (total - step) / max(1, total - warm))
    )
    loss_shown = 0.0
    with progress_bar(console) as bar:
        task = bar.add_task("fine-tuning", total=total)
        for epoch in range(epochs):
            for module in trained:
                module.train()
            for batch in todo:
                loss = loss_of(batch)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                if after_step is not None:
                    after_step()
                loss_shown = (
                    loss.item() if not loss_shown else 0.95 * loss_shown + 0.05 * loss.item()
                )
                text = f"fine-tuning, epoch {epoch + 1} of {epochs}, loss {loss_shown:.3f}"
                bar.update(task, advance=1, description=text)
            model.eval()
            reached = score()
            console.print(f"epoch {epoch + 1}: validation accuracy {reached:.1%}")
            if reached > best:
                best, kept = reached, _copies(model)
            todo = batches(rng)
    with torch.no_grad():
        for tensor, value in kept:
            tensor.copy_(value)
    model.eval()


def _copies(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Copies of what training changes: parameters with a gradient, and buffers."""
    parts = [p for p in model.parameters() if p.requires_grad]
    return [(part, part.detach().clone()) for part in (*parts, *model.buffers())]
