"""Small products whose exact results are known: does this build compute correctly on this CPU?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Odd sizes, so that every kernel meets a partial tile and a short last group.
_ROWS, _IN, _OUT, _GROUP = 5, 100, 37, 32


@dataclass(frozen=True)
class SelfTest:
    """One computation and what came of it; `failure` is empty if it is right."""

    name: str
    failure: str


def run_self_tests() -> tuple[SelfTest, ...]:
    """Compute int8 and int4 products with the kernels in use and compare them with torch's.

    All inputs are integers whose scales come out as 1, so every result is an exact integer and
    must be equal to the bit, also where the arithmetic is in floating point.

    Returns:
        One result for each computation; nothing is raised.

    Example:
        >>> all(not test.failure for test in run_self_tests())
        True
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (_ROWS, _IN), generator=generator)
    x[:, 0] = 127  # the largest magnitude of every row: its dynamic scale is 127 / 127 = 1
    int8 = torch.randint(-127, 128, (_OUT, _IN), generator=generator)
    int4 = torch.randint(0, 16, (_OUT, _IN), generator=generator)
    return (
        _check("int_mm, int8 × int8 → int32", lambda: _int_mm(x, int8), x @ int8.T),
        _check("linear W8A8", lambda: _linear(x, int8, "int8", 1), x @ int8.T),
        _check("linear W8A16", lambda: _linear(x, int8, "int8", 0), x @ int8.T),
        _check("linear W4A8", lambda: _linear(x, int4, "int4", 1), x @ (int4 - 8).T),
        _check("linear W4A16", lambda: _linear(x, int4, "int4", 0), x @ (int4 - 8).T),
    )


def _check(name: str, compute: object, expected: Tensor) -> SelfTest:
    assert callable(compute)
    try:
        result: Tensor = compute()
    except (RuntimeError, AttributeError, ValueError) as error:
        return SelfTest(name, f"raised {type(error).__name__}: {error}")
    wrong = result.double() != expected.double()
    if bool(wrong.any()):
        where = tuple(int(i) for i in wrong.nonzero()[0])
        return SelfTest(
            name,
            f"{int(wrong.sum())} of {wrong.numel()} results are wrong, the first at {where}: "
            f"{float(result[where])} instead of {float(expected[where])}",
        )
    return SelfTest(name, "")


def _int_mm(x: Tensor, weight: Tensor) -> Tensor:
    result: Tensor = torch.ops.qkernels.int_mm(x.to(torch.int8), weight.T.to(torch.int8))
    return result


def _linear(x: Tensor, codes: Tensor, format_name: str, activation: int) -> Tensor:
    from qkernels import _C

    int4 = format_name == "int4"
    group = _GROUP if int4 else -1
    groups = -(-_IN // _GROUP) if int4 else 1
    code = next(row["code"] for row in _C.formats() if row["name"] == format_name)
    layout = _C.layout(code, 0, True)
    data = codes[:, 0::2] | codes[:, 1::2] << 4 if int4 else codes
    packed = torch.ops.qkernels.pack(
        data.to(torch.uint8 if int4 else torch.int8),
        torch.ones(_OUT, groups),
        None,
        layout,
        _IN,
        group,
    )
    result: Tensor = torch.ops.qkernels.linear(
        x.float(), packed, None, None, None, None, None, layout, _IN, _OUT, group, activation, 0
    )
    return result
