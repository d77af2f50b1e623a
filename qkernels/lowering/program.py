"""The structure of a lowered model as plain JSON values: graph, modules, shapes of tensors."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qkernels.lowering.signature import Signature
from qkernels.nn.int8 import INT8_MODULES, Codes, Int8Conv, Int8Module
from qkernels.schemes import Scheme

VERSION = 1

# What a graph may call besides ops: arithmetic on sizes.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in "getitem add sub mul floordiv truediv mod neg pow eq ne lt le gt ge".split()
    },
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("sym_max", "sym_min", "sym_float", "sym_int")
    },
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc")},
}
_NAMES = {function: name for name, function in _FUNCTIONS.items()}
_PLAIN = ("dtype", "memory_format", "layout", "device")
_DOTTED = re.compile(r"\w+(\.\w+)*")
# Ops whose names begin with an underscore are torch's own affair, but for these.
_PRIVATE_OPS = ("_softmax", "_log_softmax", "_to_copy", "_native_batch_norm_legit_no_training")


@dataclass(frozen=True)
class Program:
    """What a lowered model is besides its tensors' values; the same for every copy of it.

    Args:
        signature: what it takes and returns.
        nodes: of the graph, as JSON values.
        modules: how to make each module without its values, by name.
        tensors: shape, type and whether it is a parameter, by name, for what no module holds.
    """

    signature: Signature
    nodes: list[dict[str, Any]]
    modules: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, Any]]

    @classmethod
    def of(
        cls,
        signature: Signature,
        graph: fx.Graph,
        modules: Mapping[str, nn.Module],
        tensors: Mapping[str, Tensor],
    ) -> Program:
        """The program of a graph.

        Args:
            signature: what it takes and returns.
            graph: calls `modules`, reads `tensors`.
            modules: by name.
            tensors: by name.

        Raises:
            ValueError: the graph holds what cannot be described.
        """
        return cls(
            signature,
            [_node_to_dict(node) for node in graph.nodes],
            {name: _module_to_dict(module) for name, module in modules.items()},
            {name: _tensor_to_dict(tensor) for name, tensor in tensors.items()},
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self  # nothing changes it

    def __reduce__(self) -> tuple[Any, ...]:
        return Program.from_dict, (self.to_dict(),)

    def graph(self) -> fx.Graph:
        """The graph that `of` was given.

        Raises:
            ValueError: the nodes describe none.
        """
        graph = fx.Graph()
        made: dict[str, fx.Node] = {}
        for values in self.nodes:
            made[values["name"]] = self._add_node(graph, made, values)
        graph.lint()
        return graph

    def _add_node(
        self, graph: fx.Graph, made: dict[str, fx.Node], values: Mapping[str, Any]
    ) -> fx.Node:
        op, name = values["op"], values["name"]
        target: Any = values["target"]
        known: Mapping[str, Any] = {"call_module": self.modules, "get_attr": self.tensors}.get(
            op, {}
        )
        if op == "call_function":
            target = _function(target)
        elif op not in ("placeholder", "output", "call_module", "get_attr"):
            raise ValueError(f"the graph has a node of kind {op!r}")
        elif op in ("call_module", "get_attr") and target not in known:
            raise ValueError(f"the graph names {target!r}, which is not in the file")
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ValueError(f"the graph has a node of the name {name!r}")
        args = tuple(_argument_from(value, made) for value in values["args"])
        kwargs = {str(key): _argument_from(v, made) for key, v in values["kwargs"].items()}
        return graph.create_node(op, target, args, kwargs, name)

    def shells(self) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
        """All modules and tensors, with weights and tensors on the meta device."""
        modules = {name: _module_from(values) for name, values in self.modules.items()}
        tensors = {name: _tensor_from(values) for name, values in self.tensors.items()}
        return modules, tensors

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values; `from_dict` reads them."""
        return {
            "version": VERSION,
            **self.signature.to_dict(),
            "nodes": self.nodes,
            "modules": self.modules,
            "tensors": self.tensors,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Program:
        """The program that `to_dict` described.

        Args:
            values: a mapping as `to_dict` returns it.

        Raises:
            ValueError: it is none, or of a newer version.
        """
        try:
            if values["version"] != VERSION:
                raise ValueError(
                    f"its graph has version {values['version']!r}; this qkernels reads version "
                    f"{VERSION}: upgrade it"
                )
            for name in (*values["modules"], *values["tensors"]):
                if not _DOTTED.fullmatch(name):
                    raise ValueError(f"it names a module or tensor {name!r}")
            signature = Signature.from_dict(values)
            program = cls(signature, values["nodes"], values["modules"], values["tensors"])
            program.graph()
            program.shells()
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise ValueError(f"it is no graph that this qkernels can read: {error!r}") from None
        return program


# ---- Nodes ---------------------------------------------------------------------------------------


def _node_to_dict(node: fx.Node) -> dict[str, Any]:
    target = node.target
    if node.op == "call_function":
        target = _NAMES.get(target) or str(target)  # type: ignore[arg-type]
        _function(target)
    return {
        "name": node.name,
        "op": node.op,
        "target": target,
        "args": [_argument_to(value) for value in node.args],
        "kwargs": {key: _argument_to(value) for key, value in node.kwargs.items()},
    }


def _function(name: str) -> Callable[..., Any]:
    """What a graph may call: ops that change nothing in place, and arithmetic on sizes."""
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    parts = name.split(".")
    if len(parts) == 3 and parts[0] in ("aten", "qkernels"):
        packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
        op = getattr(packet, parts[2], None)
        is_private = parts[1].startswith("_") and parts[1] not in _PRIVATE_OPS
        # from_file reads files; all others only compute.
        if isinstance(op, torch._ops.OpOverload) and not is_private and parts[1] != "from_file":
            if op._schema.is_mutable:
                raise ValueError(f"the graph calls {name}, which changes its input")
            return op
    raise ValueError(f"the graph calls {name}, which a lowered model cannot hold")


def _argument_to(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, list | tuple):
        return [_argument_to(item) for item in value]
    for kind in _PLAIN:
        if isinstance(value, getattr(torch, kind)):
            return {kind: str(value).removeprefix("torch.")}
    raise ValueError(f"the graph holds {value!r}, which a lowered model cannot hold")


def _argument_from(value: Any, made: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_argument_from(item, made) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, name),) = value.items()
    if kind == "node":
        return made[name]
    if kind == "float":
        return float(name)
    if kind == "device":
        return torch.device(name)
    found = getattr(torch, name, None)
    if kind not in _PLAIN or not isinstance(found, getattr(torch, kind)):
        raise ValueError(f"the graph holds {value!r}")
    return found


# ---- Modules and tensors -------------------------------------------------------------------------


def _module_to_dict(module: nn.Module) -> dict[str, Any]:
    assert isinstance(module, Int8Conv | Int8Module)
    codes = {
        name: module._buffers[name + "_zero_point"] is not None
        for name in module.names
        if module._buffers[name + "_scale"] is not None
    }
    values = {"kind": type(module).__name__, "settings": module.settings, "has_zero_point": codes}
    if isinstance(module, Int8Conv):
        values["scheme"] = module.scheme.to_dict()
    return values


def _module_from(values: Mapping[str, Any]) -> nn.Module:
    settings = values["settings"]
    # Only a concatenation has several inputs under one name.
    count = settings.get("count")
    codes = {}
    for name, has_zero in values["has_zero_point"].items():
        shape = [count] if count is not None and name == "x" else []
        scale = torch.full(shape, math.nan)
        codes[name] = Codes(scale, torch.zeros(shape, dtype=torch.int8) if has_zero else None)
    if values["kind"] == "Int8Conv":
        return Int8Conv(settings, codes, Scheme.from_dict(values["scheme"]), "meta")
    return INT8_MODULES[values["kind"]](settings, codes)


def _tensor_to_dict(tensor: Tensor) -> dict[str, Any]:
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "parameter": isinstance(tensor, nn.Parameter),
    }


def _tensor_from(values: Mapping[str, Any]) -> Tensor:
    dtype = getattr(torch, values["dtype"])
    tensor = torch.empty(values["shape"], dtype=dtype, device="meta")
    return nn.Parameter(tensor, requires_grad=False) if values["parameter"] else tensor
