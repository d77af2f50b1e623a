"""Which layers' float weights are read by code around them, found in its bytecode."""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn


def why_parent_needs_float(model: nn.Module, names: Sequence[str]) -> str | None:
    """Why the code around a module would break without its float weight, or None.

    Args:
        model: holds the module.
        names: all qualified names of the module.
    """
    for name in names:
        parts = name.split(".")
        for depth in range(len(parts)):
            above = model.get_submodule(".".join(parts[:depth]))
            below = tuple(parts[depth:])
            # What is read of a direct child may have been given another name before.
            close = len(below) == 1
            for read in _weights_read(type(above)):  # type: ignore[arg-type]
                if read == below or (close and read[-1:] == below):
                    return f"{type(above).__name__} reads {'.'.join(below)}.weight directly"
    return None


@functools.lru_cache(maxsize=256)
def _weights_read(kind: type[nn.Module]) -> set[tuple[str, ...]]:
    """Names that lead to the weights that a class reads in forward, what it calls, or a property.

    Read from bytecode: attributes loaded directly before `.weight`, one from the other.
    """
    found: set[tuple[str, ...]] = set()
    mine = (name for name in dir(kind) if not hasattr(nn.Module, name))
    properties = [name for name in mine if isinstance(getattr(kind, name), property)]
    pending = ["forward", *properties]
    done = set(pending)
    while pending:
        for function in _definitions(kind, pending.pop()):
            if function is nn.TransformerEncoderLayer.forward:
                continue  # reads weights on its fused path only, which can be turned off
            found.update(_paths_to_weights(function))
            for name in function.__code__.co_names:
                method = getattr(kind, name, None)
                if callable(method) and name not in done and not hasattr(nn.Module, name):
                    done.add(name)
                    pending.append(name)
    return found


def _paths_to_weights(function: Any) -> Iterator[tuple[str, ...]]:
    """Names loaded one from the other directly before `.weight`, items of containers among them.

    Args:
        function: with bytecode.
    """
    path: tuple[str, ...] = ()
    key: tuple[str, ...] = ()  # a constant that may be the key of an item
    for instruction in dis.get_instructions(function):
        name, value = instruction.opname, instruction.argval
        if name == "EXTENDED_ARG":  # goes with the next one
            continue
        if name == "LOAD_ATTR" and not key:
            if path and value in ("weight", "in_proj_weight"):
                yield path
            path += (value,)
        elif name in ("LOAD_CONST", "LOAD_SMALL_INT") and not key:
            key = (str(value),)
        elif name == "BINARY_SUBSCR" or instruction.argrepr == "[]":  # the latter from 3.14 on
            path, key = path + key, ()
        else:
            path, key = (), ()


def _definitions(kind: type[nn.Module], name: str) -> Iterator[Any]:
    """The Python function that a class has for a method or property, and those it calls by super.

    Args:
        kind: the class.
        name: of the method or property.
    """
    for base in kind.__mro__:
        if name not in base.__dict__:
            continue
        attribute = base.__dict__[name]
        for wrapped in ("fget", "__func__"):  # of properties, and of static and class methods
            attribute = getattr(attribute, wrapped, attribute)
        function = inspect.unwrap(attribute)
        if not inspect.isfunction(function):
            return
        yield function
        if "super" not in function.__code__.co_names:
            return
