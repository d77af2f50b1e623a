"""The two fine-tuned models of recovery.py: what each step of a ladder does to them."""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
from rich.console import Console

import qkernels as qk
from qkernels.demo.contenders import EMBEDDINGS, IGNORE
from qkernels.demo.data import docstring_dataset
from qkernels.demo.model import Tokenizer, build_model
from qkernels.demo.train import fit, test_accuracy, train_head
from qkernels.demo.vision import model as vision_model
from qkernels.demo.vision import train as vision_train
from qkernels.demo.vision import transfer

QUIET = Console(quiet=True)


def autocast() -> torch.autocast:
    # The cache would keep the weights that a whole run began with.
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


class Text:
    """all-MiniLM-L6-v2 tells which library a docstring comes from."""

    title = "Text: MiniLM, ten classes of docstrings; W4A8(group_size=32), embeddings in 8 bits"
    schemes: ClassVar = {"*": qk.W4A8(group_size=32), "*.embeddings": EMBEDDINGS}
    layers, epochs = 3, 2

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.data, self.tokenizer = docstring_dataset(600, seed), Tokenizer()
        self.model = build_model(len(self.data.classes), seed)

    def fit(self, lr: float, seed: int) -> None:
        last = list(self.model.layers)[len(self.model.layers) - self.layers :]
        trained = [*last, self.model.head]
        data = (self.tokenizer, self.data)
        with autocast():
            fit(self.model, trained, *data, QUIET, seed, self.epochs, lr=lr)

    def fine_tune(self) -> None:
        with autocast():
            train_head(self.model, self.tokenizer, self.data, QUIET)
        self.train_on(lr=1e-4, seed=self.seed)

    def train_on(self, lr: float = 5e-5, seed: int | None = None) -> None:
        qk.transfer.strategy(self.model, "partial", layers=self.layers)
        self.fit(lr, self.seed + 100 if seed is None else seed)

    def quantize(self) -> None:
        qk.quantize_(self.model, self.schemes, ignore=IGNORE)

    def qat(self) -> None:
        qk.prepare_qat_(self.model, self.schemes, ignore=IGNORE)
        self.train_on()
        qk.convert_(self.model)

    def lora(self) -> None:
        self.quantize()
        last = [f"*.layer.{i}.*" for i in range(6 - self.layers, 6)]
        qk.transfer.add_lora_(self.model, 8, 16, last, modules_to_save="head")
        self.fit(3e-4, self.seed + 100)

    def accuracies(self) -> tuple[float, float]:
        val, test = (
            test_accuracy(self.model, self.tokenizer, part)
            for part in (self.data.val, self.data.test)
        )
        return val, test


class Vision:
    """A small ResNet that knew digits 0 to 4 learns 5 to 9 from forty images of each."""

    title = "Vision: ResNet, digits 5 to 9; W4A16(group_size=-1), the head float"
    scheme = qk.W4A16(group_size=-1)
    source_epochs, epochs = 20, 40

    def __init__(self, seed: int) -> None:
        self.seed, self.data = seed, transfer.target_digits(seed)
        self.model = vision_model.build_model(len(self.data.classes), seed)

    def fine_tune(self) -> None:
        source = transfer.pretrained(
            transfer.source_digits(self.seed), self.seed, self.source_epochs
        )
        way = transfer.WAYS[transfer.FULL]
        self.model, _ = transfer.transferred(source, self.data, way, self.seed, self.epochs)

    def train_on(self, teacher: torch.nn.Module | None = None) -> None:
        vision_train.fit(
            self.model, self.data, self.seed + 100, self.epochs, lr=1e-3, teacher=teacher
        )

    def quantize(self) -> None:
        qk.quantize_(self.model, self.scheme, ignore=IGNORE, fold_batchnorm=True)

    def qat(self) -> None:
        qk.prepare_qat_(self.model, self.scheme, ignore=IGNORE)
        self.train_on()
        qk.convert_(self.model)

    def qat_distilled(self) -> None:
        teacher = copy.deepcopy(self.model)
        qk.prepare_qat_(self.model, self.scheme, ignore=IGNORE)
        self.train_on(teacher)
        qk.convert_(self.model)

    def lora(self) -> None:
        self.quantize()
        qk.transfer.add_lora_(self.model, 8, 16, modules_to_save="head")
        vision_train.fit(self.model, self.data, self.seed + 100, self.epochs, lr=3e-3)

    def accuracies(self) -> tuple[float, float]:
        val, test = (
            vision_train.accuracy(self.model, part) for part in (self.data.val, self.data.test)
        )
        return val, test


TASKS: dict[str, type[Text] | type[Vision]] = {"text": Text, "vision": Vision}
