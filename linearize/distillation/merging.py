"""An adapter that was kept apart becomes part of the weights."""

from __future__ import annotations

import json
from pathlib import Path

from linearize.checkpoint import check_target
from linearize.conversion.saving import save
from linearize.distillation import lora
from linearize.errors import UsageError
from linearize.loading import ADAPTER, load
from linearize.methods.base import ATTENTION
from linearize.opening import check
from linearize.progress import Progress, silent


def merge(directory: Path, *, output: Path | None = None, overwrite: bool = False, progress: Progress = silent) -> Path:
    """Write `directory` with its adapter merged (default: DIR-merged). UsageError where there is none."""
    check(directory)
    if not (directory / ADAPTER).is_dir():
        raise UsageError("this checkpoint has no adapter apart", str(directory), "linearize distill DIR --no-merge makes one")
    target = output or directory.with_name(f"{directory.resolve().name}-merged")
    check_target(target, overwrite, directory.resolve())
    progress("merge", 0, 1)
    model, tokenizer = load(directory, adapter=False, device="cpu")
    model = lora.merge(lora.attach(model, directory / ADAPTER))
    plan = model.config.linearize
    stages = [{**stage, "merged": stage["kind"] != ATTENTION} for stage in plan["stages"]]
    model.config.linearize = {**plan, "stages": stages}
    recipe = json.loads((directory / "recipe.json").read_text(encoding="utf-8"))
    kept = [path for path in (directory / "metrics.jsonl",) if path.exists()]
    save(model, tokenizer, target, overwrite=overwrite, recipe={**recipe, "stages": stages[-len(recipe["stages"]) :]}, files=kept)
    progress("merge", 1, 1)
    return target
