"""LoweredModel: a graph of integer ops as a module."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.lowering.program import Program
from qkernels.lowering.sequence import join_convolutions
from qkernels.nn.carry import why_no_kernels
from qkernels.nn.int8 import Int8Conv, Int8Module
from qkernels.nn.module import QModule
from qkernels.summary import Summary


class LoweredModel(nn.Module):
    """A model that `lower` made: int8 codes between its layers, for inference.

    Its layers have the names of the float model's. `print(model.code)` shows what runs, as Python.
    It works under `torch.compile` and `torch.export`, and is saved by `save_model` and loaded by
    `load_lowered`. Its types are fixed: `.to(torch.bfloat16)` and `.half()` leave them.

    Args:
        program: its structure.
        modules: its layers by name.
        tensors: parameters and buffers of what stayed float, by name.
        summary: what `lower` did; None in a model that was loaded.
    """

    def __init__(
        self,
        program: Program,
        modules: Mapping[str, nn.Module],
        tensors: Mapping[str, Tensor],
        summary: Summary | None = None,
    ) -> None:
        super().__init__()
        self.program = program
        self.summary = summary
        for name, module in modules.items():
            parent, last = self._parent(name)
            parent.add_module(last, module)
            if isinstance(module, Int8Conv):
                module.qualified_name = name
        for name, tensor in tensors.items():
            parent, last = self._parent(name)
            if isinstance(tensor, nn.Parameter):
                parent.register_parameter(last, tensor)
            else:
                parent.register_buffer(last, tensor)
        self._run = self._compiled()
        self.eval()

    def _parent(self, name: str) -> tuple[nn.Module, str]:
        """The module that holds something of a qualified name, made if it is missing."""
        *path, last = name.split(".")
        here: nn.Module = self
        for part in path:
            if part not in here._modules:
                here.add_module(part, nn.Module())
            here = here.get_submodule(part)
        return here, last

    @property
    def code(self) -> str:
        """What runs, as Python; `self` is the model."""
        return self.program.graph().python_code("self").src

    def _compiled(self) -> Callable[..., Any]:
        graph = self.program.graph()
        join_convolutions(graph, dict(self.named_modules()))
        code = graph.python_code("self")
        src = code.src
        # nn.Module looks attributes up in Python: microseconds for the name of a deep layer.
        for layer in self.program.modules:
            for end in "(;\n":
                src = src.replace(f" = {_by_attributes(layer)}{end}", f" = {_by_items(layer)}{end}")
        names = dict(code.globals)
        exec(compile(src, "<qkernels lowered model>", "exec"), names)
        run: Callable[..., Any] = names["forward"]
        return run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        signature = self.program.signature
        # No gradient: codes have none.
        with torch.no_grad():
            outputs = self._run(self, *signature.flatten(args, kwargs))
        return signature.unflatten(outputs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoweredModel:
        # All that runs has to be there on the new device, before anything moves.
        device = fn(torch.empty(0)).device
        needed = [m for m in self.modules() if isinstance(m, QModule | Int8Module)]
        ops = sorted({op for module in needed for op in module.ops})
        if (reason := why_no_kernels(device, ops)) is not None:
            raise RuntimeError(f"LoweredModel: {reason}")

        # Types are part of the program, and a scale that is rounded is another scale.
        def keeping_type(t: Tensor) -> Tensor:
            out = fn(t)
            return out if out.dtype == t.dtype else t.to(out.device)

        super()._apply(keeping_type, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_run"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._run = self._compiled()


def _by_attributes(layer: str) -> str:
    """How torch.fx writes the layer of a qualified name."""
    path = "self"
    for part in layer.split("."):
        path = f"{path}.{part}" if part.isidentifier() else f'getattr({path}, "{part}")'
    return path


def _by_items(layer: str) -> str:
    return "self" + "".join(f"._modules[{part!r}]" for part in layer.split("."))


def load_lowered(path: str | os.PathLike[str]) -> LoweredModel:
    """A lowered model from a file that `save_model` wrote; the float model is not needed.

    Args:
        path: of the file.

    Returns:
        The model. Its outputs are the same to the bit as those of the one that was saved.

    Raises:
        ModelFileError: the file is missing, damaged, of a newer version, or holds no lowered model.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
        >>> x = torch.randn(2, 3, 16, 16)
        >>> lowered = qk.lower(model, x, batches=[x])
        >>> qk.save_model(lowered, folder / "lowered.safetensors")
        >>> torch.equal(qk.load_lowered(folder / "lowered.safetensors")(x), lowered(x))
        True
    """
    from qkernels.io.file import ModelFileError, read_header
    from qkernels.io.load import load_model

    header = read_header(path)
    if header.program is None:
        raise ModelFileError(
            f"{path} holds no lowered model but a model's tensors; use qk.load_model(model, path)"
        )
    try:
        program = Program.from_dict(header.program)
    except ValueError as error:
        raise ModelFileError(f"{path} holds a lowered model that cannot be read: {error}") from None
    model = LoweredModel(program, *program.shells())
    load_model(model, path)
    return model
