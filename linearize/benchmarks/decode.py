"""Writing a text: seconds a token against the context, student and teacher, and whether the student's depend on it at all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import StaticCache

from linearize.benchmarks import llama_cpp
from linearize.benchmarks.bounds import Work, counted, row, weight_bytes
from linearize.benchmarks.subject import Subject, open_subject
from linearize.evaluation.reading import Reader, Variant
from linearize.evaluation.timing import in_turn
from linearize.progress import Progress, silent
from linearize.serving.compiled import compile_step
from linearize.serving.int8 import quantize

CONTEXTS, FLAT, STEPS = (16, 2048, 8192), (100, 1000, 10_000, 100_000), 20
STUDENT, TEACHER = "student", "teacher"
COMPILING = 3  # calls that may compile
SLACK = 8  # places of a static cache for calls that are not timed
Run = Callable[[], object]


def snapshots(subject: Subject, model: Any, contexts: Sequence[int], name: str) -> dict[int, Any]:
    """A cache that has taken in so many tokens, for each context: one text, read once, a chunk at a time."""
    reader, found, at = Reader(Variant(name, model)), dict[int, Any](), 0
    ids = subject.text(max(contexts))
    for done, context in enumerate(sorted(set(contexts))):
        subject.progress(f"bench: {name} reads", done, len(set(contexts)), context=context)
        reader.feed(ids[:, at:context])
        found[context], at = copy.deepcopy(reader.cache), context
    return found


def students_of(subject: Subject, compiled: bool, int8: bool) -> dict[str, Any]:
    """The student in each form that is asked for: as it is, with weights in 8 bits, and each of them compiled."""
    found = {STUDENT: subject.model}
    if int8:
        found[f"{STUDENT}, int8"] = copy.deepcopy(subject.model)
        quantize(found[f"{STUDENT}, int8"])
    for name, model in list(found.items()) if compiled else ():
        found[f"{name}, compiled"] = copy.copy(model)
        compile_step(found[f"{name}, compiled"], report=subject.progress)
    return found


def stepper(model: Any, cache: Any) -> Reader:
    """A reader that goes on from a copy of that cache; where steps are compiled, in buffers of its own."""
    if getattr(model, "linearize_step", None) is not None:
        model = copy.copy(model)
        compile_step(model)
    reader = Reader(Variant("", model))
    reader.cache = copy.deepcopy(cache)
    return reader


def token(subject: Subject, reader: Reader) -> Run:
    """One more token, a call of the model with the cache that is left of the one before."""
    ids = subject.text(1, batch=1)
    return lambda: reader(ids, keep=1)


def static(subject: Subject, cache: Any, room: int) -> Any:
    """A static cache that has taken in what a dynamic one has, with so many places more."""
    context = int(cache.get_seq_length())
    made = StaticCache(config=subject.teacher.config, max_cache_len=context + room)
    if any(layer.is_sliding for layer in cache.layers):  # whose keys are not all there any more
        reader = stepper(subject.teacher, made)
        reader.feed(subject.text(context))
        return reader.cache
    for index, layer in enumerate(cache.layers):
        made.update(layer.keys, layer.values, index)
    return made


def forms(subject: Subject, students: dict[str, Any], student: Any, teacher: Any, steps: int, compiled: Any) -> dict[str, Reader]:
    """Readers at one context: student and teacher in each form that they have."""
    found = {name: stepper(model, student) for name, model in students.items()}
    found[TEACHER] = stepper(subject.teacher, teacher)
    fixed = static(subject, teacher, steps + SLACK)
    found[f"{TEACHER}, static cache"] = stepper(subject.teacher, fixed)
    if compiled is not None:
        found[f"{TEACHER}, static cache, compiled"] = stepper(compiled, fixed)
    return found


def decode(
    subject: Subject, contexts: Sequence[int], flat: Sequence[int], steps: int, students: dict[str, Any],
    compile_teacher: bool = False, file: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Rows by context, what the teacher's best form takes over what the student's does, and the student's times by context."""
    caches = snapshots(subject, subject.model, [*contexts, *flat], STUDENT)
    teachers = snapshots(subject, subject.teacher, contexts, TEACHER)
    compiled = torch.compile(subject.teacher) if compile_teacher else None
    other = None if file is None else llama_cpp.Reader(file, max(contexts) + steps + SLACK)
    rows, ratios = [], []
    for done, context in enumerate(contexts):
        subject.progress("bench: decode", done, len(contexts), context=context)
        readers = forms(subject, students, caches[context], teachers[context], steps, compiled)
        runs: dict[str, Run] = {name: token(subject, reader) for name, reader in readers.items()}
        if other is not None:
            runs[llama_cpp.NAME] = other.at(context)
        weights = {name: weight_bytes(reader.variant.model) for name, reader in readers.items()}
        work = works(runs, weights, other)
        seconds = in_turn(runs, steps, subject.clock)
        held = {name: reader.nbytes() for name, reader in readers.items()}
        own = [row(n, seconds[n], work[n], 1, context=context, cache_bytes=held.get(n)) for n in runs]
        rows += own
        medians = {one["name"]: one["seconds"]["median"] for one in own}
        own_best = min(students, key=lambda name: medians[name])
        best = min((name for name in readers if name not in students), key=lambda name: medians[name])
        against = {name: taken / medians[own_best] for name, taken in medians.items() if name not in students}
        ratios.append({"context": context, "best_teacher": best, "best_student": own_best, "over_student": against})
    settings = {
        "contexts": list(contexts), "flat": list(flat), "steps": steps, "students": list(students),
        "compile_teacher": compile_teacher,
    }  # fmt: skip
    found: dict[str, Any] = {"ratios": ratios}
    if flat:
        name = str(ratios[-1]["best_student"]) if ratios else STUDENT
        found["flat"] = {"name": name, **flatness(subject, students[name], caches, flat, steps)}
    return subject.report("decode", settings, rows, **found)


def works(runs: dict[str, Run], weights: dict[str, int], other: Any) -> dict[str, Work]:
    """The work of a step in each form, whose weights are read once. Compiled, it is that of the same form as it is; elsewhere
    unknown."""
    found = dict[str, Work]()
    for name, run in runs.items():
        if name == llama_cpp.NAME:
            run()
            found[name] = Work(0.0, 0, other.nbytes)
        elif name.endswith("compiled"):
            for _ in range(COMPILING):
                run()
            found[name] = Work(found[name.removesuffix(", compiled")].flops, 0, weights[name])
        else:
            found[name] = counted(run, weights[name])
    return found


def flatness(subject: Subject, model: Any, caches: dict[int, Any], contexts: Sequence[int], steps: int) -> dict[str, Any]:
    """Seconds of the student's step at contexts far apart, measured in turn, and the largest over the smallest."""
    subject.progress("bench: flatness", 0, 1)
    runs = {str(context): token(subject, stepper(model, caches[context])) for context in contexts}
    for run in runs.values():
        run()
    seconds = in_turn(runs, steps, subject.clock)
    medians = [spread.median for spread in seconds.values()]
    return {
        "seconds": {context: spread.to_dict() for context, spread in seconds.items()},
        "largest_over_smallest": max(medians) / min(medians),
    }


def bench_decode(
    directory: Path, *, contexts: Sequence[int] = CONTEXTS, flat: Sequence[int] = FLAT, steps: int = STEPS,
    compile_student: bool = False, int8: bool = False, compile_teacher: bool = False, llama_cpp_file: Path | None = None,
    dtype: str = "auto", device: str = "auto", progress: Progress = silent,
) -> dict[str, Any]:  # fmt: skip
    """`decode` of a checkpoint, compiled and in 8 bits too if asked; with `llama_cpp_file` a GGUF file beside it, on llama.cpp."""
    if llama_cpp_file is not None:
        llama_cpp.need(llama_cpp_file)
    subject = open_subject(directory, dtype, device, [*contexts, *flat], progress)
    students = students_of(subject, compile_student, int8)
    return decode(subject, contexts, flat, steps, students, compile_teacher, llama_cpp_file)
