"""Opening a checkpoint: its config, once the folder proved to be a whole linearized checkpoint. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linearize.checkpoint import read_config, verify
from linearize.errors import IntegrityError, UnsupportedError, UsageError
from linearize.modeling.plans import SCHEMA_VERSION, is_causal


def check(directory: Path, hashes: bool = False) -> dict[str, Any]:
    """The plan of a checkpoint whose files are whole. Errors: no checkpoint, changed files, a newer schema."""
    if not directory.is_dir():
        raise UsageError("no such folder", str(directory), "linearize convert MODEL makes one")
    config = read_config(directory / "config.json")
    plan = config.get("linearize")
    if not isinstance(plan, dict) or not plan:
        raise UnsupportedError("this is not a linearized checkpoint", str(directory), f"linearize convert {directory}")
    version = plan.get("schema")
    if isinstance(version, int) and version > SCHEMA_VERSION:  # what is none at all is said where the plan is read
        raise IntegrityError(
            f"schema {version} is newer than this version reads ({SCHEMA_VERSION})",
            str(directory),
            "pip install -U linearize",
        )
    verify(directory, hashes)
    return config


def need_decoder(plan: Mapping[str, Any], where: str, what: str) -> None:
    """UnsupportedError for an encoder; `what` begins the sentence, as in 'perplexity is'."""
    if not is_causal(plan):
        fix = "use it on its task: AutoModelForMaskedLM or AutoModelForSequenceClassification, and transformers' Trainer"
        raise UnsupportedError(f"{what} for models that predict the next token, and this is an encoder", where, fix)
