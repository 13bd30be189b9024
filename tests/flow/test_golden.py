"""Checkpoints written by earlier schemas load and compute what they did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import linearize  # noqa: F401  (registers the classes)

GOLDEN = sorted((Path(__file__).resolve().parents[1] / "golden").glob("schema-*/*"))


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_golden(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        found = model(expected["ids"]).logits
    torch.testing.assert_close(found, expected["logits"], atol=1e-5, rtol=1e-5)


def test_there_are_some() -> None:
    assert GOLDEN
