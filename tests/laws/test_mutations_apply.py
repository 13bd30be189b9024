"""The faults in tests/mutations fit the code: what each of them replaces stands in the runtime exactly once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

tomllib: Any = pytest.importorskip("tomllib", reason="tomllib is in Python 3.11 and later")

TESTS = Path(__file__).resolve().parent.parent
RUNTIME = TESTS.parent / "linearize" / "modeling"
FILES = sorted((TESTS / "mutations").glob("*.toml"))


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_every_mutation_applies(path: Path) -> None:
    mutations: list[dict[str, str]] = tomllib.loads(path.read_text(encoding="utf-8"))["mutation"]
    assert mutations
    wrong = []
    for mutation in mutations:
        name, file, old = (mutation[key] for key in ("name", "file", "old"))
        count = (RUNTIME / file).read_text(encoding="utf-8").count(old) if old else 1
        if count != 1:
            wrong.append(f"{name}: {file} says {count} times: {old}")
    assert not wrong, "\n".join(wrong)
