"""Whole models: a pretrained sentence encoder; BERT and Llama architectures with random weights."""

from __future__ import annotations

import copy
import dataclasses
import gc
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkernels.bench import own
from qkernels.bench.bench import Bench, Unit
from qkernels.bench.engines import ModelEngine, sqnr
from qkernels.bench.results import Record

# A quantized model that is right has at least this cosine to the float one, in the mean.
WORST_COSINE = 0.8
_PROMPT, _STEPS = 128, 16
# Our own engines of quick runs.
_QUICK = ("W8A8 fp32", "W8A8 fp32 fused", "W8A8 bf16 fused", "W4A8 g32 fp32")


@dataclass(frozen=True)
class Task:
    """One way to call a model.

    Args:
        case: of the record.
        run: calls the model; the output is compared with the float model's.
    """

    case: dict[str, Any]
    run: Callable[[Any], Tensor]


@dataclass(frozen=True)
class Subject:
    """A model and what is done with it.

    Args:
        name: as `--only model=` takes it.
        make: the float32 model in eval mode.
        tasks: ways to call it.
        quality: outputs of a model that are compared with the float model's, row by row.
        compiled: whether engines that compile take part.
    """

    name: str
    make: Callable[[], nn.Module]
    tasks: tuple[Task, ...]
    quality: Callable[[Any], Tensor]
    compiled: bool = False


def units(bench: Bench) -> Iterator[Unit]:
    from transformers.utils import logging

    logging.set_verbosity_error()  # it reports weights that a model was loaded without
    logging.disable_progress_bar()
    # Models of one class count together; from the eighth on torch would run them uncompiled.
    torch._dynamo.config.recompile_limit = 64
    for make in (minilm, bert_base, llama):
        name = make.__name__.replace("_", "-")
        if bench.only.has_model(name) and not (bench.quick and make is not minilm):
            yield f"model {name}", lambda make=make: _measure(bench, make())  # type: ignore[misc]


# ---- Encoders ------------------------------------------------------------------------------------


def minilm() -> Subject:
    """all-MiniLM-L6-v2 with its weights; quality on Python's own docstrings."""
    from transformers import AutoModel, AutoTokenizer

    from qkernels.demo.model import model_folder

    folder = model_folder()

    def make() -> nn.Module:
        model: nn.Module = AutoModel.from_pretrained(
            folder, local_files_only=True, add_pooling_layer=False, dtype=torch.float32
        )
        return model.eval()

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = _sentences()[:64]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]

    def quality(model: Any) -> Tensor:
        hidden = _encode(model, ids, mask)
        mean: Tensor = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return mean

    tasks = tuple(
        _encoding("minilm", batch, tokens, 30000) for batch, tokens in ((1, 32), (32, 128))
    )
    return Subject("minilm", make, tasks, quality, compiled=True)


def bert_base() -> Subject:
    """BERT-base's architecture with random weights."""
    from transformers import BertConfig, BertModel

    def make() -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = BertModel(BertConfig(), add_pooling_layer=False).eval()
        return model

    tasks = tuple(_encoding("bert-base", batch, 128, 30000) for batch in (1, 8))
    ids = _ids(4, 64, 30000)

    def quality(model: Any) -> Tensor:
        return _encode(model, ids, torch.ones_like(ids)).flatten(0, 1)

    return Subject("bert-base", make, tasks, quality)


def _encoding(model: str, batch: int, tokens: int, vocabulary: int) -> Task:
    ids = _ids(batch, tokens, vocabulary)
    mask = torch.ones_like(ids)
    case = {"model": model, "batch": batch, "tokens": tokens}
    return Task(case, lambda model: _encode(model, ids, mask))


def _encode(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    hidden: Tensor = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return hidden


def _ids(batch: int, tokens: int, vocabulary: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1000, vocabulary, (batch, tokens), generator=generator)


def _sentences() -> list[str]:
    """Docstrings of functions that every Python has."""
    import builtins
    import os
    import shutil
    import statistics

    found: dict[str, None] = {}
    for module in (builtins, os, shutil, statistics):
        for name, value in sorted(vars(module).items()):
            text = " ".join((inspect.getdoc(value) or "").split()) if callable(value) else ""
            if len(text) > 80 and not name.startswith("_"):
                found[text] = None
    return list(found)


# ---- A decoder -----------------------------------------------------------------------------------


def llama() -> Subject:
    """A small Llama architecture with random weights: a prompt at once, then token by token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )

    def make() -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = LlamaForCausalLM(config).eval()
        return model

    prompt = _ids(1, _PROMPT, config.vocab_size)
    following = _ids(1, _STEPS, config.vocab_size)
    caches: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def prefill(model: Any) -> Tensor:
        logits: Tensor = model(input_ids=prompt, use_cache=True, logits_to_keep=1).logits
        return logits

    def decode(model: Any) -> Tensor:
        if model not in caches:
            caches[model] = model(input_ids=prompt, use_cache=True).past_key_values
        cache = caches[model]
        for step in range(_STEPS):
            token = following[:, step : step + 1]
            logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        cache.crop(-_STEPS)  # as it was after the prompt
        return torch.as_tensor(logits)

    tasks = (
        Task({"model": "llama", "batch": 1, "tokens": _PROMPT}, prefill),
        Task({"model": "llama", "batch": 1, "tokens": 1, "steps": _STEPS}, decode),
    )
    return Subject("llama", make, tasks, lambda model: model(input_ids=prompt).logits[0])


# ---- Measuring -----------------------------------------------------------------------------------


def _measure(bench: Bench, subject: Subject) -> list[Record]:
    engines = [
        e
        for e in bench.chosen([*own.model_engines(), *bench.peers.models()])
        if (not e.compiled or subject.compiled)
        and not (bench.quick and e.own and e.name not in _QUICK)
    ]
    return measure_subject(bench, "models", subject, engines)


def measure_subject(
    bench: Bench, group: str, subject: Subject, engines: Sequence[ModelEngine]
) -> list[Record]:
    """Convert a model with each engine, and time what they made of it in turns.

    Args:
        bench: the run; a quick one takes the first task.
        group: "models" or "cnn".
        subject: the model.
        engines: those that take part.
    """
    unit = f"{'model' if group == 'models' else group} {subject.name}"
    if bench.quick:
        subject = dataclasses.replace(subject, tasks=subject.tasks[:1])
    model = subject.make()
    built: list[tuple[ModelEngine, Any, dict[str, Any]]] = []
    for engine in engines:
        try:
            built.append((engine, *converted(engine, model, subject)))
        except Exception as error:
            bench.skip(engine.name, unit, error)
    records = []
    for task in subject.tasks:
        contenders = {e.name: lambda m=m, task=task: task.run(m) for e, m, _ in built}
        describe = {e.name: {"kind": e.kind, "own": e.own, **quality} for e, _, quality in built}
        record = bench.record(unit, group, task.case)
        with torch.inference_mode():
            records.append(bench.compare(record, contenders, describe))
    built.clear()
    gc.collect()
    return records


def converted(
    engine: ModelEngine, model: nn.Module, subject: Subject
) -> tuple[Any, dict[str, Any]]:
    """A copy of a model that an engine converted, ready to be timed, and how well it agrees.

    Args:
        engine: converts.
        model: the float model; it stays as it is.
        subject: whose tasks will be timed.

    Raises:
        ValueError: the converted model computes something else.
    """
    with torch.no_grad():
        made = engine.convert(copy.deepcopy(model))
    with torch.inference_mode():
        quality = _agreement(subject.quality(model), subject.quality(made))
        for task in subject.tasks:  # compiles, packs or plans whatever it will need
            task.run(made)
    return made, quality


def _agreement(reference: Tensor, got: Tensor) -> dict[str, Any]:
    """Fields of a `Result`."""
    cosines = F.cosine_similarity(reference.double(), got.double(), dim=-1)
    mean, lowest = cosines.mean().item(), cosines.min().item()
    if not mean > WORST_COSINE:
        raise ValueError(f"its outputs have a mean cosine of {mean:.3f} to the float model's")
    extra = {"cosine": mean, "cosine_min": lowest}
    return {"sqnr": sqnr(reference, got), "extra": extra}
