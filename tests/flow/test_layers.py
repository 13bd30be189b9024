"""keep:auto:K keeps the layers whose swap alone costs most, as measured on the calibration text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli.tiny import TEXT, write_model
from safetensors.torch import load_file, save_file

from linearize.conversion.convert import convert
from linearize.errors import InputError


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "book.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "book.txt"


def test_the_dearest_layer_is_kept(tmp_path: Path, text: Path) -> None:
    """A layer whose attention adds nothing costs nothing to swap: the others are dearer, and the order is the measured one."""
    source = write_model(tmp_path / "tiny", num_hidden_layers=3)
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.self_attn.o_proj.weight"].zero_()
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    made = convert(str(source), layers="keep:auto:1", options={"window": 4, "sinks": 0}, calibration=text, output=tmp_path / "out")
    costs = made.swap_costs
    assert set(costs) == {0, 1, 2}
    assert costs[1] == min(costs.values()) < 1e-6
    dearest = max(costs, key=lambda layer: costs[layer])
    assert sorted(made.plan.parts) == sorted({0, 1, 2} - {dearest})
    saved = json.loads((tmp_path / "out" / "recipe.json").read_text())["swap_costs"]
    assert {int(layer): cost for layer, cost in saved.items()} == costs
    assert torch.isfinite(torch.tensor(list(costs.values()))).all()


@pytest.mark.parametrize("selector", ["keep:auto:0", "keep:auto:2", "keep:auto:x"])
def test_something_must_be_kept_and_something_converted(selector: str, tmp_path: Path, text: Path) -> None:
    source = write_model(tmp_path / "tiny")
    with pytest.raises(InputError, match="cannot read the layers"):
        convert(str(source), layers=selector, calibration=text, output=tmp_path / "out")
