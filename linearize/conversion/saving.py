"""A whole checkpoint on disk: weights, config, tokenizer, runtime, resolved recipe, model card and manifest."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from linearize.checkpoint import staged
from linearize.conversion.detection import head
from linearize.conversion.offload import finite
from linearize.conversion.streaming import SHARD_BYTES
from linearize.errors import IntegrityError
from linearize.modeling.plans import is_causal


def save(
    model: Any, tokenizer: Any, output: Path, *,
    overwrite: bool = False, recipe: Mapping[str, Any] | None = None, files: Sequence[Path] = (),
) -> None:  # fmt: skip
    """Write a whole checkpoint: weights, config, tokenizer, runtime, resolved recipe, model card, `files` and folders, manifest."""
    plan = model.config.linearize
    bad = [name for name, p in model.named_parameters() if not finite(p)]
    if bad:
        raise IntegrityError(f"{bad[0]} has non-finite values", str(output), "nothing was written; check the source weights")
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with staged(output, overwrite, schema=plan["schema"], created=created) as stage:
        with warnings.catch_warnings():  # it reads offloaded modules a shard at a time
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
            model.save_pretrained(stage, max_shard_size=SHARD_BYTES)
        tokenizer.save_pretrained(stage)
        resolved = {"method": plan["method"], "options": plan["options"], "start": plan["start"], **(recipe or {})}
        (stage / "recipe.json").write_text(json.dumps(resolved, indent=2) + "\n", encoding="utf-8")
        card = plain_card(plan, f"AutoModel{head(type(model).__name__) or 'ForCausalLM'}")
        (stage / "README.md").write_text(card, encoding="utf-8")
        for path in files:
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, stage / path.name)


def plain_card(plan: Mapping[str, Any], auto: str) -> str:
    """A model card that claims nothing: no figure was measured yet. `auto` is the Auto class that loads the model."""
    base = plan["source"]["id"]
    front = f"---\nbase_model: {base}\nlibrary_name: transformers\ntags: [linearize, linear-attention]\n---\n"
    stages = ", ".join(stage["kind"] for stage in plan["stages"]) or "none: the mixers are as they were started"
    return (
        f"{front}\n# {base} with {len(plan['layers'])} layers linearized\n\nMethod `{plan['method']}`, trained stages: {stages}. "
        f"{'State of constant size' if is_causal(plan) else 'Cost linear in the length of the text'}.\n\n"
        "```python\nimport linearize  # or trust_remote_code=True\n"
        f"from transformers import {auto}\nmodel = {auto}.from_pretrained(PATH)\n```\n"
    )
