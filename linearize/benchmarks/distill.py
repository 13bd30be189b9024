"""Training: each stage against what it would cost without conversion, its memory, its time by length, and where it goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from linearize.benchmarks.bounds import counted, row, weight_bytes
from linearize.benchmarks.operators import step_profile
from linearize.benchmarks.probe import probe
from linearize.benchmarks.subject import Subject, open_subject
from linearize.benchmarks.training import (
    LOSS,
    Run,
    attention_step,
    lora_step,
    packed_rows,
    stage_of,
    teacher_pass,
    there_and_back,
    with_adapter,
)
from linearize.conversion.blocks import recomputing
from linearize.evaluation.timing import in_turn
from linearize.methods.base import ATTENTION, LORA, Stage
from linearize.progress import Progress, silent

RATIO, PEAK, LENGTHS, PROFILE = PARTS = ("ratio", "peak", "lengths", "profile")
KINDS = (ATTENTION, LORA)
SEQUENCES, BY_LENGTH, TEACHER_TO = (1024,), (1024, 4096, 16384, 32768), 8192
Rows = list[dict[str, Any]]


def bench_distill(
    directory: Path, *, sequences: Sequence[int] = SEQUENCES, kinds: Sequence[str] = KINDS, parts: Sequence[str] = PARTS,
    lengths: Sequence[int] = BY_LENGTH, teacher_to: int = TEACHER_TO, repeats: int = 3, dtype: str = "auto", device: str = "auto",
    progress: Progress = silent,
) -> dict[str, Any]:  # fmt: skip
    """All `parts` of the stages `kinds`: throughput ratios at row lengths `sequences`, the peak of stage attention over the
    teacher's, forward and backward pass by `lengths` (the teacher's to `teacher_to`), operators of a step.
    """
    by_length = [x for x in lengths if LENGTHS in parts]
    subject = open_subject(directory, dtype, device, [*sequences, *by_length], progress)
    settings = {
        "sequences": list(sequences), "kinds": list(kinds), "parts": list(parts), "lengths": list(by_length), "repeats": repeats,
        "teacher_to": teacher_to, "loss": LOSS,
    }  # fmt: skip
    rows, found = stages(subject, sequences, kinds, parts, repeats)
    if by_length:
        again, found["by_length"] = lengths_apart(subject, by_length, teacher_to, repeats)
        rows += again
    if PEAK in parts and ATTENTION in kinds and stage_of(subject.model, ATTENTION) is not None:
        asked = {"dtype": dtype, "device": device, "sequence": max(sequences)}
        progress("bench: peak memory", 0, 1)
        answers = {kind: probe(kind, directory, **asked) for kind in ("teacher", ATTENTION)}
        found["peak"] = {**answers, "sequence": max(sequences), "ratio": answers[ATTENTION]["peak"] / answers["teacher"]["peak"]}
    return subject.report("distill", settings, rows, **found)


def stages(
    subject: Subject, sequences: Sequence[int], kinds: Sequence[str], parts: Sequence[str], repeats: int
) -> tuple[Rows, dict[str, Any]]:
    """Rows and ratios of both stages at each row length, and profiles of a step at the first."""
    rows, ratios, profiles = Rows(), Rows(), dict[str, Any]()
    known = {kind: stage for kind in kinds if (stage := stage_of(subject.model, kind)) is not None}
    for kind, stage in known.items():
        models = adapted(subject, stage) if kind == LORA else {}
        for sequence in sequences:
            subject.progress(f"bench: {kind}", 0, 1, sequence=sequence)
            runs = lora_runs(models, stage, subject.text(sequence)) if kind == LORA else attention_runs(subject, sequence)
            if RATIO in parts:
                own, ratio = compared(subject, runs, kind, sequence, repeats)
                rows, ratios = rows + own, [*ratios, ratio]
            if PROFILE in parts and sequence == sequences[0]:
                profiles[kind] = step_profile(runs[kind], subject.clock)
        undo(subject, models)
    return rows, {"ratios": ratios, "profiles": profiles}


def attention_runs(subject: Subject, sequence: int) -> dict[str, Any]:
    """A step of attention transfer on a row of one document, on one as the built-in text packs them, and the teacher's pass."""
    ids = subject.text(sequence)
    packed = packed_rows(subject.tokenizer, sequence, subject.device)
    return {
        ATTENTION: attention_step(subject.model, ids), f"{ATTENTION}, packed": attention_step(subject.model, *packed),
        "teacher forward": teacher_pass(subject.teacher, ids),
    }  # fmt: skip


def adapted(subject: Subject, stage: Stage) -> dict[str, Any]:
    """Student and stock model with LoRA, and what is trained of each; the stock one is made of the student as it was."""
    teacher = subject.teacher
    return {LORA: with_adapter(subject.model, stage), "lora, unconverted": with_adapter(teacher, stage)}


def undo(subject: Subject, models: Mapping[str, Any]) -> None:
    """Take the adapters off again."""
    for model, _ in models.values():
        model.unload()


def lora_runs(models: Mapping[str, Any], stage: Stage, ids: Tensor) -> dict[str, Any]:
    return {name: lora_step(model, parameters, stage, ids) for name, (model, parameters) in models.items()}


def compared(subject: Subject, runs: Mapping[str, Run], kind: str, sequence: int, repeats: int) -> tuple[Rows, dict[str, Any]]:
    """Rows of runs over as many tokens each, and the throughput of each over that of the last, which is not converted."""
    read = weight_bytes(subject.model)
    work = {name: counted(run, read) for name, run in runs.items()}
    seconds = in_turn(runs, repeats, subject.clock)
    rows = [row(name, seconds[name], work[name], sequence, length=sequence) for name in runs]
    *own, base = runs
    ratios = {name: seconds[base].median / seconds[name].median for name in own}
    return rows, {"stage": kind, "length": sequence, "over": base, "throughput": ratios}


def lengths_apart(subject: Subject, lengths: Sequence[int], teacher_to: int, repeats: int) -> tuple[Rows, dict[str, Any]]:
    """Forward and backward pass of student and of teacher, each on its own, layers computed again in the backward pass.

    Short rows are timed more often, for half as long as one of the longest takes: what else the machine does is short, too.
    """
    stage = stage_of(subject.model, LORA) or Stage(LORA, 1, 1e-4)
    rows, found = Rows(), dict[str, Any]()
    for name, model, limit in (("student", subject.model, max(lengths)), ("teacher", subject.teacher, teacher_to)):
        trained, _ = with_adapter(model, stage)
        runs = {length: there_and_back(trained, subject.text(length)) for length in lengths if length <= limit}
        if not runs:
            continue
        a_token = {}
        with recomputing(model):
            for done, (length, run) in enumerate(runs.items()):
                subject.progress(f"bench: {name} by length", done, len(runs), length=length)
                work = counted(run, weight_bytes(model))
                # right after one of its own length: what another left of memory would have to be mapped anew
                seconds = in_turn({name: run}, max(repeats, max(runs) // length // 2), subject.clock)[name]
                rows.append(row(f"{name}, forward and backward", seconds, work, length, length=length))
                a_token[str(length)] = seconds.median / length
        found[name] = {"seconds_a_token": a_token, "largest_over_smallest": max(a_token.values()) / min(a_token.values())}
    return rows, found
