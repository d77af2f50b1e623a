"""The op `op_sequence`: its programs, and its fake.

How a program is written down is said in `csrc/ops/cpu_op_sequence.cpp`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# The numbers of ops in a program, as C++ has them.
OPS = ("linear", "linear_shared", "attention", "add_norm")


def signature(op: str) -> list[str]:
    """The types of an op's arguments, as "Tensor", "Optional[Tensor]" or "List[int]".

    Args:
        op: one of `OPS`.
    """
    schema = getattr(torch.ops.qkernels, op).default._schema
    return [str(argument.type) for argument in schema.arguments]


@torch.library.register_fake("qkernels::op_sequence")
def run_one_by_one(
    inputs: Sequence[Tensor],
    program: Sequence[int],
    factors: Sequence[float],
    outputs: Sequence[int],
) -> list[Tensor]:
    """What `op_sequence` computes, by calls of its ops.

    Args:
        inputs: the first values.
        program: of the steps.
        factors: numbers of the steps that are no integers.
        outputs: the values to return.
    """
    values = list(inputs)
    numbers, others = iter(program), iter(factors)

    def one(kind: str) -> Any:
        if kind == "float":
            return next(others)
        number = next(numbers)
        if "Tensor" in kind:
            return None if number == -1 else values[number // 2]
        return bool(number) if kind == "bool" else number

    for op in numbers:
        kinds = signature(OPS[op])
        lists = any(kind.startswith("List") for kind in kinds)
        count = next(numbers) if lists else 0
        arguments = [
            [one(kind) for _ in range(count)] if kind.startswith("List") else one(kind)
            for kind in kinds
        ]
        results = getattr(torch.ops.qkernels, OPS[op]).default(*arguments)
        values += [results] if isinstance(results, Tensor) else results
    return [values[i] for i in outputs]
