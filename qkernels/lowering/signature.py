"""What a lowered model takes and returns: structure, shapes and types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class InputSpec:
    """One tensor that a model takes.

    Args:
        name: of the argument.
        shape: sizes; None where any will do.
        dtype: "float32" and so on.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str

    def check(self, value: object) -> None:
        """Refuse what the graph was not made for.

        Raises:
            TypeError: not a tensor.
            ValueError: another shape or type.
        """
        if not isinstance(value, Tensor):
            raise TypeError(
                f"LoweredModel: {self.name} is {type(value).__name__}; expected a tensor"
            )
        fits = value.dim() == len(self.shape) and all(
            want is None or size == want for size, want in zip(value.shape, self.shape, strict=True)
        )
        if not fits or str(value.dtype) != f"torch.{self.dtype}":
            wanted = ", ".join("any" if size is None else str(size) for size in self.shape)
            raise ValueError(
                f"LoweredModel: {self.name} is {value.dtype} of shape {tuple(value.shape)}, but "
                f"the model was lowered for torch.{self.dtype} of shape ({wanted}); lower it with "
                "example_inputs (and dynamic_shapes) like the data to come"
            )


@dataclass(frozen=True)
class Signature:
    """How a call's arguments become the graph's inputs, and its outputs the result.

    Args:
        inputs: one for each leaf of the arguments; None for what is no tensor.
        in_spec: structure of (args, kwargs).
        out_spec: structure of the result.
    """

    inputs: tuple[InputSpec | None, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec

    @property
    def counts(self) -> tuple[int, tuple[str, ...]]:
        """How many positional arguments there are, and the names of the keyword ones."""
        args, kwargs = self.in_spec.children()
        return args.num_children, tuple(kwargs.context or ())

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The graph's inputs for a call.

        Args:
            args: positional arguments.
            kwargs: keyword arguments.

        Raises:
            TypeError: arguments of another structure, or no tensor.
            ValueError: a tensor of another shape or type.
        """
        if self._simple and len(args) == len(self.inputs) and not kwargs:
            flat: list[Any] = list(args)
        else:
            flat = self._flatten(args, kwargs)
        for spec, value in zip(self.inputs, flat, strict=True):
            if spec is not None:
                spec.check(value)
        return flat

    @cached_property
    def _simple(self) -> bool:
        """Whether the arguments are tensors by position, and nothing nested."""
        args, kwargs = self.in_spec.children()
        return kwargs.num_children == 0 and all(child.is_leaf() for child in args.children())

    def _flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        flat, found = pytree.tree_flatten((args, kwargs))
        if found != self.in_spec:
            names = [spec.name if spec else "a constant" for spec in self.inputs]
            raise TypeError(
                f"LoweredModel: the call has other arguments than the example_inputs it was "
                f"lowered with ({', '.join(names)}); pass them in the same way"
            )
        return flat

    def unflatten(self, outputs: Any) -> Any:
        """The result that the original model would give.

        Args:
            outputs: of the graph, a sequence.
        """
        return pytree.tree_unflatten(list(outputs), self.out_spec)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values; `from_dict` reads them."""
        inputs = [
            spec and {"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype}
            for spec in self.inputs
        ]
        return {
            "inputs": inputs,
            "arguments": pytree.treespec_dumps(self.in_spec),
            "result": pytree.treespec_dumps(self.out_spec),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Signature:
        """What `to_dict` described.

        Args:
            values: a mapping as `to_dict` returns it.

        Raises:
            ValueError: it is none, or names a result type that is not imported.
        """
        inputs = tuple(
            spec and InputSpec(str(spec["name"]), tuple(spec["shape"]), str(spec["dtype"]))
            for spec in values["inputs"]
        )
        try:
            specs = [pytree.treespec_loads(values[key]) for key in ("arguments", "result")]
        except NotImplementedError as error:
            raise ValueError(
                f"{error} Import the library that defines the model's result type first"
            ) from None
        return cls(inputs, *specs)
