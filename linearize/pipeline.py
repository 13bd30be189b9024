"""Several arrows in one go: evaluate a checkpoint against its teacher, and the demo."""

from __future__ import annotations

from pathlib import Path

from linearize import text
from linearize.conversion.teacher import teacher_host
from linearize.evaluation.fidelity import LENGTH, Evaluation, evaluate_model, held_out_rows
from linearize.loading import load
from linearize.progress import Progress, silent


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
    source = data or text.BUILTIN
    docs = text.documents(source)
    model, tokenizer = load(directory, device=device)
    plan = model.config.linearize
    trained_on = {stage.get("data", text.BUILTIN) for stage in plan["stages"]} | {text.BUILTIN}
    held_out = source in trained_on
    if held_out:
        _, docs = text.split(docs)
    notes = [f"the held-out documents of {source}, which no stage trains on"] if held_out else []
    rows = held_out_rows(tokenizer, docs, tokens)
    host, note = teacher_host(model, plan, teacher, device)
    notes += [note] if note else []
    return evaluate_model(model, host, tokenizer, rows, str(directory), source, recall=recall, seed=seed, notes=notes, progress=progress)
