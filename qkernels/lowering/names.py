"""Names for what a lowered model holds: those of the float model's modules, where they are free."""

from __future__ import annotations

import re

from torch import fx, nn

from qkernels.lowering.nodes import op_of

_RESERVED = frozenset((*dir(nn.Module()), "program", "summary", "code"))


def module_of(node: fx.Node) -> tuple[str, str]:
    """Qualified name and class of the innermost module whose forward made a node.

    Args:
        node: of a captured graph.
    """
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return "", ""
    path, kind = list(stack.values())[-1]
    # A module that is called again has the number of the call behind its name.
    name = re.sub(r"@\d+", "", str(path))
    return name, (kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]


def kind_of(node: fx.Node) -> str:
    """What a node is for people: the class of its module, or the op.

    Args:
        node: of a captured graph.
    """
    op = op_of(node).removeprefix("aten::").lstrip("_")
    return op or node.name


class Names:
    """Hands out names, each once.

    Args:
        leaves: names of the modules without children.
        tensors: names of the model's parameters and buffers.
    """

    def __init__(self, leaves: set[str]) -> None:
        self._leaves = leaves
        self._given: set[str] = set()
        self._tensors: dict[str, str] = {}

    def of_node(self, node: fx.Node) -> str:
        """The name that a node goes by: that of its module, or of the op within it.

        Args:
            node: of a captured graph.
        """
        name, _ = module_of(node)
        if name and name in self._leaves:
            return name
        return f"{name}.{kind_of(node)}" if name else kind_of(node)

    def of_module(self, node: fx.Node, suffix: str = "") -> str:
        """A free name for the module that gives a node's value.

        Args:
            node: of a captured graph.
            suffix: what sets it apart from the module that does the work.
        """
        wanted = self.of_node(node) if node.op == "call_function" else str(node.target)
        wanted = f"{wanted}_{suffix}" if suffix else wanted
        return self._free(wanted)

    def of_tensor(self, name: str) -> str:
        """A free name for a parameter or buffer, the same for each time it is asked for.

        Args:
            name: in the float model.
        """
        if name not in self._tensors:
            self._tensors[name] = self._free(name)
        return self._tensors[name]

    def _free(self, wanted: str) -> str:
        first, _, rest = wanted.partition(".")
        if first in _RESERVED:
            wanted = f"{first}_" + (f".{rest}" if rest else "")
        parts = wanted.split(".")
        if any(".".join(parts[:end]) in self._given for end in range(1, len(parts))):
            wanted = "_".join(parts)  # what holds it has become something else
        name, count = wanted, 1
        while not self._is_free(name):
            count += 1
            name = f"{wanted}_{count}"
        self._given.add(name)
        return name

    def _is_free(self, name: str) -> bool:
        """Whether nothing has this name, or is in or around it."""
        parts = name.split(".")
        around = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
        return not around & self._given and not any(n.startswith(name + ".") for n in self._given)
