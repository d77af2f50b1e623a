"""One result for every ISA and every number of threads, to the bit, where integers are summed."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.process import run_python
from qkernels import _C

SCRIPT = Path(__file__).with_name("digests.py")
# A session on one ISA compares it with the reference; one that is free compares all.
ISAS = sorted({"scalar", os.environ.get("QKERNELS_ISA") or "scalar"})
if not os.environ.get("QKERNELS_ISA"):
    ISAS = _C.available_isas()


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    """What digests.py printed, by ISA; each ran in a process of its own."""
    found = {}
    for isa in ISAS:
        printed = json.loads(run_python(SCRIPT, isa=isa).stdout)
        assert printed["isa"] == isa
        assert all(f"_{isa.removesuffix('bf16')}_" in f"{k}_" for k in printed["kernels"])
        found[isa] = printed["threads"]
    return found


def differences(a: dict[str, str], b: dict[str, str]) -> list[str]:
    assert a.keys() == b.keys()
    return [case for case in a if a[case] != b[case]]


def test_all_isas_agree(results: dict[str, dict[str, Any]]) -> None:
    reference = results["scalar"]["1"]["exact"]
    assert len(reference) > 60
    wrong = {isa: differences(reference, r["1"]["exact"]) for isa, r in results.items()}
    assert not any(wrong.values()), wrong


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["exact", "float"])
def test_threads_do_not_matter(results: dict[str, dict[str, Any]], isa: str, kind: str) -> None:
    assert not differences(results[isa]["1"][kind], results[isa]["2"][kind])


def test_digests_see_a_single_bit() -> None:
    """Or else equal hashes would mean nothing."""
    sys.path.insert(0, str(SCRIPT.parent))
    import torch
    from digests import digest

    x = torch.zeros(3, 5)
    y = x.clone()
    y[2, 4] = -0.0
    assert digest([x]) != digest([y])
    y = x.clone()
    y.view(torch.int32)[1, 1] = 1
    assert digest([x]) != digest([y])
    nan = torch.full((2,), torch.nan)
    assert digest([nan]) == digest([-nan])
