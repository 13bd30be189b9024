"""Reading a text: student, teacher, and the network without attention, against the length; and a long text in little memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize.benchmarks.bounds import counted, row, weight_bytes
from linearize.benchmarks.probe import probe
from linearize.benchmarks.subject import Subject, open_subject
from linearize.conversion.calibration import few_logits
from linearize.evaluation.reading import CHUNK
from linearize.evaluation.speed import crossover
from linearize.evaluation.timing import in_turn
from linearize.progress import Progress, silent

LENGTHS = (512, 1024, 2048, 4096, 8192)


def read_whole(model: Any, ids: Tensor, keep: bool = True) -> None:
    """One call over all of a text (1, T), which leaves a cache behind (`keep`) and the last token's logits."""
    with torch.no_grad():
        model(input_ids=ids, use_cache=keep, **few_logits(model))


def prefill(subject: Subject, lengths: Sequence[int], repeats: int) -> dict[str, Any]:
    """Rows by length, how the student's time compares to the others', and from which length on it is ahead of the teacher."""
    rows, ratios = [], []
    runs = {"student": (subject.model, True), "teacher": (subject.teacher, True), "floor": (subject.floor, False)}
    for done, length in enumerate(lengths):
        subject.progress("bench: prefill", done, len(lengths), length=length)
        ids = subject.text(length)
        own = {name: partial(read_whole, model, ids, keep) for name, (model, keep) in runs.items()}
        work = {name: counted(run, weight_bytes(runs[name][0])) for name, run in own.items()}
        seconds = in_turn(own, repeats, subject.clock)
        rows += [row(name, seconds[name], work[name], length, length=length) for name in own]
        student, teacher, floor = (seconds[name].median for name in ("student", "teacher", "floor"))
        ratios.append({"length": length, "teacher_over_student": teacher / student, "student_over_floor": student / floor})
    subject.progress("bench: prefill", len(lengths), len(lengths))
    taken = {name: [r["seconds"]["median"] for r in rows if r["name"] == name] for name in ("student", "teacher")}
    ahead = crossover(lengths, taken["student"], taken["teacher"])
    return subject.report("prefill", {"lengths": list(lengths), "repeats": repeats}, rows, ratios=ratios, student_ahead_from=ahead)


def bench_prefill(
    directory: Path, *, lengths: Sequence[int] = LENGTHS, long: int = 0, chunk: int = CHUNK, repeats: int = 3,
    dtype: str = "auto", device: str = "auto", progress: Progress = silent,
) -> dict[str, Any]:  # fmt: skip
    """`prefill` of a checkpoint; with `long` also the memory that a process takes to read so many tokens, `chunk` at a time."""
    subject = open_subject(directory, dtype, device, [*lengths, long], progress)
    found = prefill(subject, lengths, repeats)
    if long:
        progress("bench: long text", 0, 1, tokens=long)
        found["long"] = probe("prefill", directory, dtype=dtype, device=device, tokens=long, chunk=chunk)
    return found
