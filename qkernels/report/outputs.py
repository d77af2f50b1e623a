"""How a batch is given to a model, and which tensor of its answer is compared."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# What Hugging Face models name the answer of a task head, and of a bare encoder or decoder.
_PREFERRED = ("logits", "last_hidden_state")


@dataclass(frozen=True)
class MainOutput:
    """The tensor of a model's answer that is compared, and the name it goes by."""

    name: str
    tensor: Tensor


class Caller:
    """Calls a model on batches the way its `forward` takes them.

    A tensor is the only argument, a tuple or list the positional arguments, a mapping the keyword
    arguments. What `forward` has no parameter for (labels, for instance) is not passed, and
    `left_out` names it. Tensors go to the model's device first.

    Args:
        model: the module to call.
        call: `call(model, batch)` for models that are called in another way.
        op: what messages name as the function that was called.
        argument: what that function names `call`.
    """

    def __init__(
        self,
        model: nn.Module,
        call: Callable[[nn.Module, Any], Any] | None = None,
        *,
        op: str = "compare",
        argument: str = "call",
    ) -> None:
        self.model = model
        self.left_out: set[str] = set()
        self._op = op
        self._way_out = f"pass {argument}=lambda model, batch: ..."
        self._call = call
        self._positional, self._keywords = _parameters(model)
        self._device = next(
            (t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu")
        )

    def __call__(self, batch: Any) -> Any:
        batch = to_device(batch, self._device)
        if self._call is not None:
            return self._call(self.model, batch)
        if isinstance(batch, Tensor):
            return self.model(batch)
        if isinstance(batch, Mapping):
            taken = {
                name: value
                for name, value in batch.items()
                if self._keywords is None or name in self._keywords
            }
            self.left_out.update(f"'{name}'" for name in batch if name not in taken)
            if not taken:
                raise ValueError(
                    f"{self._op}: no key of the batch ({', '.join(map(str, batch))}) is a "
                    f"parameter of {type(self.model).__name__}.forward; {self._way_out}"
                )
            return self.model(**taken)
        if isinstance(batch, (tuple, list)):
            count = len(batch) if self._positional is None else self._positional
            self.left_out.update(f"element {i}" for i in range(count, len(batch)))
            return self.model(*batch[:count])
        raise TypeError(
            f"{self._op}: a batch must be a tensor, a tuple or list of arguments, or a mapping of "
            f"keyword arguments, got {type(batch).__name__}; {self._way_out}"
        )


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode for a while, then every module's own flag again."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def _parameters(model: nn.Module) -> tuple[int | None, frozenset[str] | None]:
    """How many positional arguments and which keywords `forward` takes; None for any."""
    parameters = inspect.signature(model.forward).parameters.values()
    kinds = {p.kind for p in parameters}
    positional = None
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        positional = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    keywords = None
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        keywords = frozenset(
            p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        )
    return positional, keywords


def to_device(value: Any, device: torch.device) -> Any:
    """The same nest of tuples, lists and mappings with every tensor on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(item, device) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(item, device) for item in value)
    return value


def main_output(output: Any) -> MainOutput:
    """Choose the tensor to compare from what a model returned.

    A tensor is taken as it is. From a mapping, a Hugging Face `ModelOutput` or any object with
    such attributes: `logits`, else `last_hidden_state`, else the first floating-point tensor with
    at least one dimension. From a tuple or list: its first such tensor.

    Args:
        output: the model's answer.

    Raises:
        TypeError: there is no floating-point tensor in it.

    Example:
        >>> main_output({"loss": torch.tensor(0.5), "logits": torch.zeros(2, 3)}).name
        'logits'
    """
    if isinstance(output, Tensor) and output.is_floating_point():
        return MainOutput("output", output)
    for name in _PREFERRED:
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, Tensor):
            return MainOutput(name, value)
    items: list[tuple[str, Any]] = []
    if isinstance(output, Mapping):
        items = [(str(key), value) for key, value in output.items()]
    elif isinstance(output, (tuple, list)):
        items = [(f"output[{i}]", value) for i, value in enumerate(output)]
    for name, value in items:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0:
            return MainOutput(name, value)
    raise TypeError(
        f"compare: the model returned {type(output).__name__} without a floating-point tensor to "
        f"compare; pass call=lambda model, batch: ... that returns the tensor that counts"
    )


@dataclass(frozen=True)
class Tokens:
    """Which tokens of a batch are real: the batch's shape [batch, tokens], and their positions."""

    shape: tuple[int, int]
    positions: Tensor

    def of(self, tensor: Tensor) -> Tensor:
        """The real tokens' rows [tokens, ...] of a tensor [batch, tokens, ...], else all of it."""
        if tensor.dim() < 3 or tensor.shape[:2] != self.shape:
            return tensor
        return tensor.flatten(0, 1).index_select(0, self.positions.to(tensor.device))


def real_tokens(batch: Any) -> Tokens | None:
    """What the `attention_mask` of a Hugging Face batch says; None if there is no padding."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
        return None
    return Tokens((mask.shape[0], mask.shape[1]), mask.flatten().nonzero().flatten())


def without_padding(tensor: Tensor, tokens: Tokens | None) -> Tensor:
    """The rows of real tokens, if padding is known and the tensor has the batch's shape."""
    return tensor if tokens is None else tokens.of(tensor)


def shape_text(batch: Any) -> str:
    """The shapes of a batch for people: `input_ids 32×128, attention_mask 32×128`."""
    if isinstance(batch, Tensor):
        return "×".join(map(str, batch.shape)) or "scalar"
    if isinstance(batch, Mapping):
        return ", ".join(f"{k} {shape_text(v)}" for k, v in batch.items() if isinstance(v, Tensor))
    if isinstance(batch, (tuple, list)):
        return ", ".join(shape_text(item) for item in batch if isinstance(item, Tensor))
    return type(batch).__name__
