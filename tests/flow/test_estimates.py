"""What a plan tells of memory, disk and time, held against models that are built and checkpoints that are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.tiny import TEXT, write_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from linearize.conversion.architectures import ARCHITECTURES
from linearize.conversion.convert import convert
from linearize.conversion.estimates import COSTS, RANK, START, estimate, forward_flops
from linearize.conversion.plan import make_plan, plan_for
from linearize.conversion.sources import Source
from linearize.conversion.streaming import tensor_sizes
from linearize.methods import DEFAULT, get
from linearize.methods.base import KINDS
from linearize.recipe import recipe_of
from linearize.testing.families import tiny_family

RATE = 1e9


def source_of(config: Any) -> Source:
    """A model on the hub, of which nothing but its config is here."""
    values = json.loads(config.to_json_string(use_diff=False))
    return Source("x/y", "x/y", "hub", None, {key: value for key, value in values.items() if key in type(config)().to_dict()})


@pytest.fixture
def given(tmp_path: Path) -> Path:
    (tmp_path / "book.txt").write_text(TEXT, encoding="utf-8")
    return write_model(tmp_path / "tiny", num_hidden_layers=4)


@pytest.mark.parametrize("logits", [False, True])
def test_a_forward_pass_is_counted_as_torch_counts_it(logits: bool) -> None:
    length = 32
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=300,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # it computes the masked half too, as the formula has it
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        (model if logits else model.model)(torch.zeros(1, length, dtype=torch.long))
    found = forward_flops(plan_for(source_of(config), DEFAULT, None, {}, "calibrated"), logits, length)
    rope = 2 * config.head_dim / 2 * length  # a product of frequencies and positions, of both rows of a call
    assert length * found == pytest.approx(counter.get_total_flops(), abs=2 * rope)


@pytest.mark.parametrize("family", [name for name, family in ARCHITECTURES.items() if family.causal])
def test_parameters_are_told_from_the_config_of_a_model_that_is_not_here(family: str) -> None:
    """Up to norms, biases, routers and learned positions, and a feed-forward of two matrices where most have three."""
    model = tiny_family(family)
    told = sum(tensor_sizes(source_of(model.config), ARCHITECTURES[family]))
    assert told == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.35)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_disk_is_what_the_checkpoint_takes(given: Path, tmp_path: Path, dtype: str) -> None:
    made = convert(str(given), output=tmp_path / "out", calibration=tmp_path / "book.txt", dtype=dtype)
    weights = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    told = estimate(made.plan, dtype, "cpu", RATE)
    assert told.dtype == dtype
    assert told.disk_bytes == pytest.approx(weights, rel=0.1)  # beside names and shapes
    assert told.free_bytes >= told.disk_bytes / 2


def test_time_is_the_budget_of_each_stage_at_the_rate(given: Path) -> None:
    plan = make_plan(str(given), method="hedgehog")
    slow, fast = (estimate(plan, device="cpu", rate=rate) for rate in (RATE, 10 * RATE))
    assert set(slow.seconds) == {START} | {stage.kind for stage in get("hedgehog").stages} <= set(COSTS)
    for kind, seconds in slow.seconds.items():
        assert seconds == pytest.approx(10 * fast.seconds[kind])
    for stage in get("hedgehog").stages:
        assert slow.tokens[stage.kind] == stage.tokens


def test_a_recipe_s_stages_are_what_is_told_of(given: Path) -> None:
    """Its tokens, and longer rows, whose attention is more to compute."""
    plan = make_plan(str(given), method="hedgehog")
    short, long = (recipe_of({"method": "hedgehog", "stages": {"long": {"tokens": "5k", "sequence": n}}}) for n in (64, 8192))
    first, second = (estimate(plan, device="cpu", rate=RATE, stages=made.stages) for made in (short, long))
    assert first.tokens == second.tokens
    assert first.tokens["long"] == 5000
    assert set(first.tokens) == {START, "long"}
    assert second.seconds["long"] > 2 * first.seconds["long"] > 0


def test_every_stage_of_every_kind_has_a_cost() -> None:
    from linearize.methods import names
    from linearize.methods.layout import stages_of

    assert {stage.kind for name in names() for stage in stages_of(name)} | set(KINDS) <= set(COSTS)


def test_layers_kept_by_cost_are_planned_without_being_known(given: Path, tmp_path: Path) -> None:
    """All four are shown; what they cost is that of those that will be converted, and that takes the whole model."""
    whole, plan = (make_plan(str(given), layers=layers) for layers in (None, "keep:auto:1"))
    made, every = plan.to_dict(), whole.to_dict()
    assert (plan.keeps, len(plan.parts)) == (1, 4)
    assert (made["converted"], made["kept"]) == (3, 1)
    for key in ("state_bytes", "parameters_added"):
        assert made[key] * 4 == every[key] * 3
    assert not plan.route.streamed
    assert "keep:auto" in plan.route.reason
    told = estimate(plan, device="cpu", rate=RATE)
    assert RANK in told.seconds
    assert RANK not in estimate(whole, device="cpu", rate=RATE).seconds
    done = convert(str(given), layers="keep:auto:1", calibration=tmp_path / "book.txt", output=tmp_path / "out").plan
    assert done.to_dict()["state_bytes"] == made["state_bytes"]
    assert (done.keeps, len(done.parts), done.route.streamed) == (0, 3, True)
