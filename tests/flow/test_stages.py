"""What a stage holds, trains and keeps: graphs that end with their layer, fp32 over 16 bits, fused projections, saved states."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.tiny import TEXT, Cli, write_model
from safetensors.torch import load_file
from torch import nn

from linearize import convert_model
from linearize.cli.units import number
from linearize.conversion.convert import convert
from linearize.distillation import lora, stages
from linearize.distillation.layer_losses import LayerCall
from linearize.distillation.loop import Trainer
from linearize.distillation.run import distill
from linearize.distillation.stages import AttentionTransfer, mixer_parameters
from linearize.distillation.state import states
from linearize.errors import UsageError
from linearize.methods.base import Stage
from linearize.modeling.modeling_linearized import attentions
from linearize.testing.families import tiny_family

TRANSFER = Stage("attention", 1, 1e-2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """In 16 bits."""
    given = write_model(tmp_path_factory.mktemp("source") / "tiny", dtype="bfloat16")
    return convert(str(given), output=given.parent / "linear", calibration=text, options={"window": 8}, dtype="bfloat16").path


def test_each_layer_has_its_own_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a layer is reached, the gradients of the layers before are there, and what made them is gone."""
    model = convert_model(tiny_family("llama"), method="default", options={"window": 4}).requires_grad_(False)
    for parameter in mixer_parameters(model).values():
        parameter.requires_grad_(True)
    real, seen = stages.LAYER_LOSSES["relative_mse"], list[weakref.ref[Any]]()
    mixers: list[nn.Module] = [module.linearize for module in attentions(model)]

    def watched(call: LayerCall) -> torch.Tensor:
        gc.collect()
        layer = len(seen)
        assert call.mixer is mixers[layer]
        assert all(made() is None for made in seen), "outputs of earlier layers are held"
        taught = [any(p.grad is not None for p in mixer.parameters()) for mixer in mixers]
        assert taught == [True] * layer + [False] * (len(mixers) - layer)
        loss = real(call)
        seen.append(weakref.ref(call.output))
        return loss

    monkeypatch.setitem(stages.LAYER_LOSSES, "relative_mse", watched)
    AttentionTransfer(model, TRANSFER).backward(torch.randint(3, 90, (2, 24)), torch.arange(24).expand(2, -1))
    assert len(seen) == len(mixers) == 3


def test_what_is_trained_and_its_moments_are_fp32(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[set[torch.dtype]] = []
    real = Trainer._save

    def seen(self: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
        real(self, optimizer, step)
        state = states(self.run)[-1]
        found.append({x.dtype for name in ("parameters", "optimizer") for x in load_file(state / f"{name}.safetensors").values()})

    monkeypatch.setattr(Trainer, "_save", seen)
    monkeypatch.setattr("linearize.devices.fast_bf16", lambda: True)  # else the model would be fp32 on some machines
    sets = ["stages.lora.mixer_lr=1e-3"]
    made = distill(folder, data=str(text), sequence=32, tokens=128, save_every=2, sets=sets, output=tmp_path / "out")
    assert len(found) > 4
    assert all(dtypes == {torch.float32} for dtypes in found)
    attention, adapted = made.stages
    assert [group["dtype"] for group in attention["trained"] + adapted["trained"]] == ["float32"] * 3
    tensors = load_file(made.path / "model.safetensors")
    assert {x.dtype for name, x in tensors.items() if ".linearize." in name} == {torch.float32}
    assert {x.dtype for name, x in tensors.items() if ".linearize." not in name} == {torch.bfloat16}


def test_what_a_stage_trains_is_said(folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parameters, their count, dtype and rate, before the first step."""
    given = ["--data", text, "--sequence", "32", "--tokens", "64", "--set", "stages.lora.mixer_lr=0.002", "-o", tmp_path / "out"]
    done = Cli(capsys)("distill", folder, *given)
    assert done.code == 0, done.err
    count = sum(x.numel() for name, x in load_file(folder / "model.safetensors").items() if ".linearize." in name)
    said = f"{number(count)} float32"
    lines = [line for line in done.err.splitlines() if "trained=" in line]
    assert f"distill: attention  trained=mixers {said} lr 0.01" in lines[0]
    assert "trained=lora " in lines[1]
    assert f"float32 lr 0.0002, mixers {said} lr 0.002" in lines[1]


def test_an_adapter_on_projections_that_are_one_matrix() -> None:
    """Phi-3's qkv_proj and GPT-2's c_attn take it once, whichever of q, k, v is asked for, and it is merged."""
    for family, fused in (("phi3", "qkv_proj"), ("gpt2", "c_attn")):
        model = convert_model(tiny_family(family), method="default", options={"window": 4})
        before = {name: x.clone() for name, x in model.named_parameters()}
        adapted = lora.add_adapter(model, Stage("lora", 1, 1e-3, rank=2, targets=("q", "v")), 0)
        places = {name.split(".lora_A")[0].rsplit(".", 1)[1] for name, _ in adapted.named_parameters() if "lora_A" in name}
        assert places == {fused}
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data.normal_()
        merged = dict(lora.merge(adapted).named_parameters())
        changed = {name for name, x in before.items() if not torch.equal(merged[name], x)}
        assert len(changed) == 3
        assert all(f"{fused}.weight" in name for name in changed)
        with pytest.raises(UsageError, match="no projection 'x'") as refused:
            lora.check_targets(Stage("lora", 1, 1e-3, targets=("x",)), model)
        assert f"({fused} holds qkv in one)" in refused.value.fix


def test_the_last_states_stay_and_pruning_comes_last(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[list[str]] = []
    real = Trainer._save

    def seen(self: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
        before = {path.name for path in states(self.run)}
        real(self, optimizer, step)
        found.append([path.name for path in states(self.run)])
        assert (before | set(found[-1])) - before <= {found[-1][-1]}

    def removed(path: Path, **_: Any) -> None:
        newest = max(path.parent.glob("step-*"))
        assert json.loads((newest / "linearize.json").read_text())["files"], "the new state is whole before an old one goes"
        assert path != newest
        rmtree(path)

    from linearize.distillation import state

    rmtree = state.shutil.rmtree
    monkeypatch.setattr(Trainer, "_save", seen)
    with monkeypatch.context() as patch:
        patch.setattr(state, "shutil", type("shutil", (), {"rmtree": staticmethod(removed)}))
        given: dict[str, Any] = {"stage": "attention", "sequence": 32, "tokens": 32 * 10, "save_every": 2, "keep": 3}
        distill(folder, data=str(text), output=tmp_path / "out", **given)
    steps = [[int(name.rsplit("-", 1)[1]) for name in names] for names in found]
    assert steps == [[0], [0, 2], [0, 2, 4], [2, 4, 6], [4, 6, 8], [6, 8, 10]]
    assert not (tmp_path / "out.run").exists()
