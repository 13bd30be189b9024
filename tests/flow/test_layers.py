"""Which layers are converted: those that grow with the text; with keep:auto:K all but those whose swap alone costs most."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli.tiny import TEXT, write_model
from safetensors.torch import load_file, save_file

from linearize.conversion.convert import convert
from linearize.conversion.plan import Plan, plan_for
from linearize.conversion.sources import Source
from linearize.errors import InputError
from linearize.methods.layout import check_options


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


def planned(layers: str | None, **config: object) -> Plan:
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 12, "vocab_size": 300}
    return plan_for(Source("x", "x", "memory", None, {**shape, **config}), "default", layers, {}, "calibrated")


def test_sliding_layers_are_left_alone() -> None:
    """They are constant memory already. Asked for, they are converted with a window no longer than their own reach."""
    gemma = {"model_type": "gemma3_text", "sliding_window": 32}
    assert list(planned(None, **gemma).parts) == [5, 11]
    windows = {layer: place.mixer.window for layer, place in planned("all", **gemma).parts.items()}
    assert windows == {layer: 64 if layer in (5, 11) else 32 for layer in range(12)}


def test_bytes_of_layers_that_are_kept() -> None:
    """A layer that slides keeps its window and no more, one of full attention grows; what is saved is of those converted."""
    token = 2 * 4 * 16 * 2  # bytes a layer: keys and values of 4 heads of 16 numbers of 16 bits
    gemma = {"model_type": "gemma3_text", "sliding_window": 32, "head_dim": 16, "num_key_value_heads": 4}
    made = planned(None, **gemma)
    assert made.kv_bytes(1000) == token * (10 * 32 + 2 * 1000)
    assert made.kv_bytes(20) == token * 12 * 20
    assert made.kv_bytes_saved(1000) == token * 2 * 1000 - made.state_bytes
    rows = made.to_dict()["layers"]
    assert [rows[i]["state_bytes"] for i in (0, 4)] == [token * 32] * 2
    assert rows[5]["state_bytes"] == made.state_bytes // 2
    llama = planned("0-3", model_type="llama")
    assert llama.to_dict()["layers"][4]["state_bytes"] is None
    assert llama.kv_bytes_saved(1000) == llama.kv_bytes(1000) // 3 - llama.state_bytes


def test_a_model_whose_layers_all_slide_is_converted_whole() -> None:
    assert len(planned(None, model_type="mistral", sliding_window=4096).parts) == 12
    assert len(planned(None, model_type="qwen2", sliding_window=4096, use_sliding_window=False).parts) == 12
    assert list(planned(None, model_type="qwen2", sliding_window=32, use_sliding_window=True, max_window_layers=3).parts) == [
        0,
        1,
        2,
    ]


def test_options_of_single_layers() -> None:
    options = {"window": 8, "slots@1-2,5": 4, "window@5": 16}
    shape = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 6, "vocab_size": 300}
    parts = plan_for(Source("x", "x", "memory", None, shape), "default", None, options, "calibrated").parts
    assert [parts[i].mixer.window for i in range(6)] == [8, 8, 8, 8, 8, 16]
    assert [parts[i].mixer.slots for i in range(6)] == [0, 4, 4, 0, 0, 4]


def test_heads_that_a_model_has_not_are_refused() -> None:
    options = {"slots": 4, "more_slots": 8, "more_heads": "0,2-3"}
    shape = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 300}
    parts = plan_for(Source("x", "x", "memory", None, shape), "default", None, options, "calibrated").parts
    assert parts[1].mixer.more_heads == (0, 2, 3)
    with pytest.raises(InputError, match="more_heads names kv head 2, and the model has 2"):
        plan_for(Source("x", "x", "memory", None, shape | {"num_key_value_heads": 2}), "default", None, options, "calibrated")


@pytest.mark.parametrize(
    ("option", "what"), [("slots@x", "cannot read the layers of 'slots@x'"), ("slotz@1", "unknown option 'slotz'")]
)
def test_bad_options_of_single_layers(option: str, what: str) -> None:
    with pytest.raises(InputError, match=what):
        check_options("default", {option: 4})
