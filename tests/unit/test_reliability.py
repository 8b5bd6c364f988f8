"""Each promise of docs/reliability.md names the test that proves it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROOF = re.compile(r"`((?:tests|benchmarks)/[\w/]+\.py)(?:::(\w+))?`")


def test_every_promise_has_a_proof_that_is_there() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    for row in rows:
        proofs = PROOF.findall(row)
        assert proofs, row
        for file, name in proofs:
            assert not name or f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), (file, name)
            assert (ROOT / file).is_file(), file
