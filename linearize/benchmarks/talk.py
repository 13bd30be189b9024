"""Memory of a talk: the most that a process held once it had taken in a few tokens, and once it had taken in many."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from linearize.benchmarks.probe import probe
from linearize.benchmarks.subject import check_subject
from linearize.opening import check
from linearize.progress import Progress, silent

TOKENS, TURN = (1000, 100_000), 128


def bench_memory(
    directory: Path, *, tokens: Sequence[int] = TOKENS, turn: int = TURN, dtype: str = "auto", device: str = "auto",
    progress: Progress = silent,
) -> dict[str, Any]:  # fmt: skip
    """Peaks of one process that talks in turns of `turn` tokens, after each of `tokens` in all, and the last over the first."""
    check_subject(directory, tokens)
    report = partial(progress, "bench: memory of a talk")
    report(0, max(tokens))
    found = probe("talk", directory, report, tokens=sorted(tokens), turn=turn, dtype=dtype, device=device)
    peaks = found.pop("peaks")
    return {
        "benchmark": "memory", "model": str(directory), "method": check(directory)["linearize"]["method"],
        "settings": {"tokens": sorted(tokens), "turn": turn}, "rows": peaks, "process": found,
        "last_over_first": peaks[-1]["peak"] / peaks[0]["peak"],
    }  # fmt: skip
