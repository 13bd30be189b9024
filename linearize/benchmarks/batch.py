"""Many sequences at once: tokens a second against their number, and the memory of states against that of a KV cache."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from linearize.benchmarks.bounds import counted, row, weight_bytes
from linearize.benchmarks.decode import STUDENT, TEACHER, Run, snapshots
from linearize.benchmarks.subject import Subject, open_subject
from linearize.devices import forget_peak, held_memory, machine_memory, peak_memory
from linearize.evaluation.reading import Reader, Variant
from linearize.evaluation.timing import in_turn
from linearize.modeling.native import give_back
from linearize.modeling.plans import plan_layers
from linearize.modeling.spec import Shape
from linearize.progress import Progress, silent

SIZES, CONTEXT, STEPS = (1, 2, 4, 8, 16, 32, 64), 8192, 5
TEACHER_SHARE = 0.25  # of the machine's memory: larger caches of the teacher are counted, not made


def kv_bytes(subject: Subject, tokens: int) -> int:
    """Bytes of the keys and values that the unconverted model keeps of so many tokens, in the dtype of its weights."""
    shape = Shape(**plan_layers(subject.plan)[0]["shape"])
    layers: int = len(subject.plan["layers"]) + subject.plan["softmax_layers"]
    width = shape.kv_heads * (shape.head_dim + shape.value_dim)
    return tokens * layers * width * int(subject.model.dtype.itemsize)


def copies(model: Any, cache: Any, size: int) -> Reader:
    """A reader of so many sequences that all said the same so far."""
    reader = Reader(Variant("", model))
    reader.cache = copy.deepcopy(cache)
    reader.cache.batch_repeat_interleave(size)
    return reader


def batch(subject: Subject, sizes: Sequence[int], context: int, steps: int) -> dict[str, Any]:
    """Rows by number of sequences, for the student and, while its cache is small enough to be made, the teacher.

    `cache_bytes` is what is held, `kv_bytes` what a KV cache would take, `peak` the most that the process held meanwhile.
    """
    memory, whole = machine_memory(subject.device), weight_bytes(subject.model)
    limit = TEACHER_SHARE * memory
    made = {STUDENT: (subject.model, snapshots(subject, subject.model, [context], STUDENT)[context])}
    if kv_bytes(subject, context) <= limit:
        made[TEACHER] = (subject.teacher, snapshots(subject, subject.teacher, [context], TEACHER)[context])
    rows, ratios = [], []
    for done, size in enumerate(sizes):
        subject.progress("bench: batch", done, len(sizes), sequences=size)
        give_back()
        known = forget_peak(subject.device)
        kv, ids = kv_bytes(subject, size * context), subject.text(1, batch=size)
        readers = {name: copies(*own, size) for name, own in made.items() if name == STUDENT or kv <= limit}
        runs: dict[str, Run] = {name: partial(reader, ids, keep=1) for name, reader in readers.items()}
        held = {name: reader.nbytes() for name, reader in readers.items()}
        work = {name: counted(run, whole + held[name]) for name, run in runs.items()}
        seconds = in_turn(runs, steps, subject.clock)
        facts = {"sequences": size, "context": context, "kv_bytes": kv}
        rows += [row(n, seconds[n], work[n], size, **facts, cache_bytes=held[n]) for n in runs]
        if known and list(readers) == [STUDENT]:
            rows[-1]["peak"] = peak_memory(subject.device)
        if TEACHER in readers:
            ratios.append({"sequences": size, "teacher_over_student": seconds[TEACHER].median / seconds[STUDENT].median})
    settings = {"sizes": list(sizes), "context": context, "steps": steps, "teacher_limit": limit}
    return subject.report("batch", settings, rows, ratios=ratios, memory=fits(subject, rows, context, memory))


def fits(subject: Subject, rows: Sequence[dict[str, Any]], context: int, memory: int) -> dict[str, Any]:
    """How many sequences of `context` tokens the machine's memory holds beside the weights, of states and of KV caches."""
    weights = sum(p.numel() * p.element_size() for p in subject.model.parameters())
    last = [one for one in rows if one["name"] == STUDENT][-1]
    state, kv, free = last["cache_bytes"] / last["sequences"], kv_bytes(subject, context), memory - weights
    return {
        "machine": memory, "held": held_memory(subject.device), "weights": weights, "state_a_sequence": state,
        "kv_a_sequence": kv, "sequences_of_states": int(free / state), "sequences_of_kv": int(free / kv),
    }  # fmt: skip


def bench_batch(
    directory: Path, *, sizes: Sequence[int] = SIZES, context: int = CONTEXT, steps: int = STEPS, dtype: str = "auto",
    device: str = "auto", progress: Progress = silent,
) -> dict[str, Any]:  # fmt: skip
    """`batch` of a checkpoint."""
    return batch(open_subject(directory, dtype, device, [context], progress), sizes, context, steps)
