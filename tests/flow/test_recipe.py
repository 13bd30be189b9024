"""Recipes: strict keys, what is set over them, and the checkpoint that comes of one; adapters apart, and merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli.tiny import ROOT, TEXT, write_model
from safetensors.torch import load_file
from transformers import LlamaConfig

from linearize.conversion.convert import convert
from linearize.conversion.plan import plan_for
from linearize.conversion.sources import Source
from linearize.distillation.merging import merge
from linearize.distillation.run import distill
from linearize.errors import InputError, LinearizeError, UsageError
from linearize.loading import ADAPTER, load
from linearize.recipe import count, read, recipe_of

WRITTEN = """\
# linearize distill DIR --recipe recipe.yaml
data: [PATH]
sequence: 32
stages:
  attention: {tokens: 256, lr: 1e-2, loss: relative_mse + 0.1*mass, window_min: 4, far_weight: 2}
  lora: {tokens: 256, loss: kl + 0.1*ce + 0.1*hidden, temperature: 2, targets: [q, v], rank: 2, mixer_lr: 1e-3}
  long: {tokens: 256, sequence: 64}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("recipes")
    (place / "book.txt").write_text(TEXT, encoding="utf-8")
    (place / "recipe.yaml").write_text(WRITTEN.replace("PATH", str(place / "book.txt")), encoding="utf-8")
    source = write_model(place / "tiny")
    return convert(str(source), output=place / "linear", calibration=place / "book.txt", options={"window": 8}).path


def test_a_recipe_runs_whole(folder: Path, tmp_path: Path) -> None:
    made = distill(folder, recipe=read(folder.parent / "recipe.yaml"), sets=["stages.lora.rank=3"], output=tmp_path / "out")
    attention, lora, long = made.stages
    assert [stage["kind"] for stage in made.stages] == ["attention", "lora", "long"]
    assert (lora["rank"], lora["targets"], long["rank"], long["targets"]) == (3, ["q", "v"], 3, ["q", "v"])
    assert (attention["sequence"], lora["sequence"], long["sequence"]) == (32, 32, 64)
    before, after = (load_file(place / "model.safetensors") for place in (folder, made.path))
    changed = {name for name in before if ".linearize." not in name and not torch.equal(before[name], after[name])}
    assert changed
    assert all("q_proj" in name or "v_proj" in name for name in changed)


def test_an_adapter_apart_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    """Kept apart, merged later, merged at once: the same logits; the weights beside an adapter are the teacher's own."""
    given = {"data": str(folder.parent / "book.txt"), "stage": "lora", "tokens": 320, "sequence": 32}
    whole = distill(folder, output=tmp_path / "whole", **given)
    apart = distill(folder, output=tmp_path / "apart", merge=False, **given)
    assert whole.stages[0]["note"].startswith("the mixers were never fitted")
    own, kept = (load_file(place / "model.safetensors") for place in (folder, apart.path))
    assert all(torch.equal(own[name], kept[name]) for name in own if ".linearize." not in name)
    assert (apart.path / ADAPTER / "adapter_model.safetensors").is_file()
    merged = merge(apart.path, output=tmp_path / "merged")
    one, other = (load_file(place / "model.safetensors") for place in (whole.path, merged))
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
    ids = torch.randint(5, 90, (1, 24))
    with torch.no_grad():
        first, second, bare = (load(p)[0](ids).logits for p in (whole.path, apart.path, folder))
    assert torch.allclose(first, second, atol=1e-4)
    assert not torch.allclose(first, bare, atol=1e-4)
    assert json.loads((merged / "config.json").read_text())["linearize"]["stages"][-1]["merged"] is True
    with pytest.raises(UsageError, match="apart"):
        distill(apart.path, **given)
    with pytest.raises(UsageError, match="no adapter"):
        merge(folder)


def test_the_length_that_is_asked_for_is_that_of_the_stage_that_is_named(folder: Path, tmp_path: Path) -> None:
    text = str(folder.parent / "book.txt")
    made = distill(folder, data=text, stage="long", sequence=32, tokens=64, output=tmp_path / "out")
    assert [(stage["sequence"], stage["tokens"]) for stage in made.stages] == [(32, 64)]


def test_a_head_takes_no_adapter(folder: Path, tmp_path: Path) -> None:
    for target, said in (("lm_head", "output head"), ("x", "no projection 'x'")):
        with pytest.raises(UsageError, match=said):
            distill(
                folder, data=str(folder.parent / "book.txt"), stage="lora", tokens=64, sequence=32, output=tmp_path / "out",
                sets=[f"stages.lora.targets={target}"],
            )  # fmt: skip


@pytest.mark.parametrize(
    "raw, sets, said, fix",
    [
        ({"sead": 1}, [], "unknown key 'sead'", "'seed'"),
        ({"stages": {"lorra": {}}}, [], "unknown stage 'lorra'", "'lora'"),
        ({"stages": {"lora": {"rang": 4}}}, [], "unknown key 'rang'", "'rank'"),
        ({"stages": {"lora": {}, "attention": {}}}, [], "not in order", "attention, lora, long"),
        ({}, ["stages.lora.rank=many"], "rank cannot be 'many'", "rank: 1"),
        ({}, ["stages.lora.dropout=2"], "between", "dropout"),
        ({}, ["stages"], "not key=value", "--set"),
        ({"method": "liger"}, [], "method liger, the checkpoint's is default", "--method liger"),
        ({"sequence": 3}, [], "at least 8", "1024"),
        ({"options": ["window"]}, [], "options cannot be", "window: 128"),
    ],
)
def test_what_a_recipe_cannot_say(raw: dict[str, object], sets: list[str], said: str, fix: str) -> None:
    with pytest.raises(LinearizeError, match=said) as error:
        recipe_of(raw, sets, "default")
    assert fix in error.value.fix


def test_a_recipe_is_read(tmp_path: Path) -> None:
    made = recipe_of({"stages": {"attention": {"tokens": "1.5M", "lr": "1e-3"}}}, ["stages.lora.targets=q,v", "recall=0.05"])
    assert (made.stages[0].tokens, made.stages[0].lr, made.stages[1].targets, made.recall) == (1_500_000, 1e-3, ("q", "v"), 0.05)
    assert [stage.kind for stage in recipe_of().stages] == ["attention", "lora"]
    assert count("200k") == 200_000
    (tmp_path / "bad.yaml").write_text("a: [1,\nb: 2", encoding="utf-8")
    with pytest.raises(InputError, match=r"not YAML: .*bad.yaml:2"):
        read(tmp_path / "bad.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_at_hand(path: Path) -> None:
    """Each makes a layout of a model of SmolLM2's shape, all layers of it, whose state is 5 MB at most and two stages teach."""
    config = LlamaConfig(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, architectures=["LlamaForCausalLM"]
    )
    recipe = recipe_of(read(path))
    plan = plan_for(Source("x", "x", "memory", None, config.to_dict()), recipe.method, None, recipe.options, "calibrated")
    assert len(plan.parts) == 30
    assert plan.state_bytes <= 5_000_000
    assert [stage.kind for stage in recipe.stages] == ["attention", "lora"]
    assert sum(stage.tokens for stage in recipe.stages) <= 2_000_000
    assert any(mixer.has_near for mixer in plan.mixers) != ("windowless" in path.stem)
