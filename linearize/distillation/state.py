"""A run's training state on disk: safetensors and JSON only, written whole or not at all, the last two kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from linearize.checkpoint import staged, verify
from linearize.errors import InputError, IntegrityError
from linearize.methods.base import Stage

# what states say nothing of that were saved before there was such a field
UNSAID = {f.name: list(f.default) if isinstance(f.default, tuple) else f.default for f in fields(Stage) if f.default is not MISSING}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and steps by parameter number."""
    return {f"{i}.{name}": x for i, entry in optimizer.state_dict()["state"].items() for name, x in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, x in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = x
    groups, first = [], 0  # not optimizer.state_dict(): one that is sharded has no whole one
    for group in optimizer.param_groups:
        last = first + len(group["params"])
        groups.append({**group, "params": list(range(first, last))})
        first = last
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def states(run: Path) -> list[Path]:
    """Saved states, oldest first; folders still being written are none."""
    return sorted(p for p in run.glob("step-*") if "." not in p.name)


def save_state(
    run: Path, stage: int, step: int, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer, facts: dict[str, Any],
    keep: int,
) -> None:  # fmt: skip
    """Write run/step-<stage>-<step>; all but the last `keep` are pruned, only after it is complete."""
    target = run / f"step-{stage}-{step:08d}"
    with staged(target, overwrite=True) as folder:
        save_file({name: x.detach().contiguous() for name, x in parameters.items()}, folder / "parameters.safetensors")
        save_file(optimizer_tensors(optimizer), folder / "optimizer.safetensors")
        (folder / "state.json").write_text(json.dumps({**facts, "stage": stage, "step": step}), encoding="utf-8")
    for old in states(run)[:-keep]:
        shutil.rmtree(old)


def latest_state(run: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]] | None:
    """Facts, parameters and optimizer tensors of the newest complete state; a broken one is passed over."""
    for folder in reversed(states(run)):
        try:
            verify(folder)
        except IntegrityError:
            continue
        facts = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return facts, load_file(folder / "parameters.safetensors"), load_file(folder / "optimizer.safetensors")
    return None


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """InputError if a resumed run would not go on as it began."""
    before = _flat(saved)
    for key, value in _flat(now).items():
        if before.get(key) != value:
            what = f"the run was begun with {key} {before.get(key)}, not {value}"
            raise InputError(what, "--resume", f"give it {key} {before.get(key)}, or begin anew with --overwrite")


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts with a key for each field of each stage, as recipes name them."""
    if "stages" not in facts:
        return dict(facts)
    stages = [{**UNSAID, **stage} for stage in facts["stages"]]
    fields_ = {f"stages.{stage['kind']}.{key}": x for stage in stages for key, x in stage.items()}
    return {**facts, "stages": ", ".join(stage["kind"] for stage in stages), **fields_}
