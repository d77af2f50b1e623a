"""docs/NUMERICS.md points at tests for what it says: they must exist."""

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def test_every_proof_exists() -> None:
    text = (TESTS.parent / "docs/NUMERICS.md").read_text()
    proofs = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    assert len(proofs) > 20
    missing = [
        f"{file}::{name}"
        for file, name in proofs
        if not re.search(rf"^def {name}\(", (TESTS / file).read_text(), re.MULTILINE)
    ]
    assert not missing
