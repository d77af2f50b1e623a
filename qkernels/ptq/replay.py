"""Running just enough of a model, again and again, to see the inputs of its layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from qkernels.ptq.blocks import Group, Stop, Trace, input_of, main_tensor
from qkernels.report.outputs import Caller, Tokens, real_tokens, without_padding

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Replay:
    """Shows the inputs of layers on all batches, as the layers before them compute now.

    Layers in a block need the block's inputs only, which are kept for one block at a time; they
    come from the block before, if it hands them on directly, else from a run of the model up to
    the block. Other layers need a run of the model up to them.

    Args:
        model: in eval mode; its layers may be replaced between calls of `run`.
        batches: what it is called on.
        traced: how it ran on these batches.
        call: see `Caller`.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        traced: Trace,
        call: Callable[[nn.Module, Any], Any] | None,
    ) -> None:
        self._model = model
        self._batches = batches
        self._trace = traced
        self._caller = Caller(model, call)
        self._block: str | None = None
        self._inputs: list[Arguments] = []

    def run(self, group: Group, see: Callable[[int, str, Tensor], None]) -> None:
        """Show every input of a group of layers.

        Args:
            group: the layers; what they share is shown once.
            see: called with the batch's number, the layer's name and x; a Linear's x comes without
                the rows of padding tokens.
        """
        if group.block is not None:
            self._enter(group.block)
        shown = set(group.layers[:1]) if self._is_one_input(group) else set(group.layers)
        for i, batch in enumerate(self._batches):
            if group.calls[i]:
                self._run_one(i, group, shown, see, real_tokens(batch))

    def _is_one_input(self, group: Group) -> bool:
        modules = {id(self._model.get_submodule(name).weight) for name in group.layers}
        return len(modules) == len(group.layers)

    def _run_one(
        self,
        i: int,
        group: Group,
        shown: set[str],
        see: Callable[[int, str, Tensor], None],
        tokens: Tokens | None,
    ) -> None:
        left = group.calls[i]

        def hook_for(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                nonlocal left
                if name in shown:
                    x = input_of(args, kwargs)
                    see(i, name, without_padding(x, tokens) if isinstance(module, nn.Linear) else x)
                left -= 1
                if left == 0:
                    raise Stop

            return hook

        self._until_stopped(
            {name: hook_for(name) for name in group.layers},
            lambda: self._start(i, group.block),
        )

    def _start(self, i: int, block: str | None) -> Any:
        if block is None:
            return self._caller(self._batches[i])
        args, kwargs = self._inputs[i]
        # Copies, because a block may write to what it is given.
        return self._model.get_submodule(block)(*_copied(args), **_copied(kwargs))

    def _enter(self, block: str) -> None:
        if block == self._block:
            return
        if self._block is not None and self._trace.before.get(block) == self._block:
            for i, (args, kwargs) in enumerate(self._inputs):
                output = main_tensor(self._start(i, self._block))
                self._inputs[i] = ((output, *args[1:]), kwargs)
        else:
            self._inputs = [self._inputs_of(block, batch) for batch in self._batches]
        self._block = block

    def _inputs_of(self, block: str, batch: Any) -> Arguments:
        found: list[Arguments] = []

        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            found.append((_copied(args), _copied(kwargs)))
            raise Stop

        self._until_stopped({block: hook}, lambda: self._caller(batch))
        return found[0]

    def _until_stopped(
        self, hooks: dict[str, Callable[..., None]], start: Callable[[], Any]
    ) -> None:
        handles = [
            self._model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
            for name, hook in hooks.items()
        ]
        try:
            start()
        except Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple | list):
        return type(value)(map(_copied, value))
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return value
