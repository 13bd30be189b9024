"""Distillation end to end on a tiny model: both stages, resuming, two processes, the teacher inside the student."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.tiny import TEXT, write_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from linearize.cli.distill import launch
from linearize.conversion.convert import convert
from linearize.distillation import loop
from linearize.distillation.run import distill
from linearize.errors import Interrupted, UsageError
from linearize.loading import load
from linearize.methods import make, names
from linearize.modeling.modeling_linearized import mode
from linearize.pipeline import evaluate
from linearize.serving.generate import Settings
from linearize.serving.session import Session
from linearize.testing.points import HEADLINE

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
SHORT: dict[str, Any] = {"sequence": 64, "tokens": 64 * 24}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.jsonl"
    path.write_text("\n".join(json.dumps({"text": TEXT[i : i + 300 + 17 * i]}) for i in range(30)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("source") / "tiny")


def converted(source: Path, text: Path, folder: Path, method: str) -> Path:
    options = {"window": 8} if method in ("default", "lolcats", "liger") else {}
    return convert(str(source), method=method, output=folder / method, calibration=text, options=options, start="published").path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("method", HEADLINE)
def test_every_method_learns_and_loads(method: str, source: Path, text: Path, tmp_path: Path) -> None:
    folder = converted(source, text, tmp_path, method)
    taught = distill(folder, data=str(text), **SHORT)
    assert taught.path == folder.with_name(f"{method}-distilled")
    untaught, student = (evaluate(d, data=str(text), tokens=512, recall=False).row("student") for d in (folder, taught.path))
    figure = "kl" if taught.stages[-1]["loss"] == "kl" else "perplexity"
    assert student[figure] < untaught[figure]
    model = AutoModelForCausalLM.from_pretrained(taught.path)
    assert len(model.config.linearize["stages"]) == len(taught.stages)
    assert (taught.path / "metrics.jsonl").is_file()
    assert not folder.with_name(f"{method}-distilled.run").exists()
    before, after = weights(folder), weights(taught.path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("q_proj" in name for name in changed), "LoRA was not merged"
    assert not any("mlp" in name or "embed" in name for name in changed)


@pytest.mark.parametrize("method", [name for name in names() if name not in HEADLINE])
def test_every_other_method_goes_the_whole_way(method: str, source: Path, text: Path, tmp_path: Path) -> None:
    """Convert with the calibrated start, one step of each stage, eval, chat."""
    options = {"window": 8} if make(method).point().has_near else {}
    folder = convert(str(source), method=method, output=tmp_path / method, calibration=text, options=options).path
    taught = distill(folder, data=str(text), sequence=64, tokens=128)
    found = evaluate(taught.path, data=str(text), tokens=128, recall=False)
    assert all(math.isfinite(row["perplexity"]) for row in found.rows)
    assert "".join(Session.of(*load(taught.path)).ask("Once", Settings(max_tokens=4)))


def test_transfer_leaves_the_teacher_alone(source: Path, text: Path, tmp_path: Path) -> None:
    folder = converted(source, text, tmp_path, "default")
    taught = distill(folder, data=str(text), stage="attention", **SHORT).path
    model, _ = load(taught)
    original = AutoModelForCausalLM.from_pretrained(source).eval()
    ids = torch.randint(3, 200, (2, 40))
    with torch.no_grad():
        student = model(ids).logits
        with mode(model, "teacher"):
            assert torch.equal(model(ids).logits, original(ids).logits)
        assert not torch.equal(student, original(ids).logits)


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process receives SIGTERM while it works on this step."""
    real = loop.Trainer._step

    def stopping(self: loop.Trainer, *args: Any) -> float:
        if args[-1] == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args)

    monkeypatch.setattr(loop.Trainer, "_step", stopping)


@pytest.mark.parametrize("stage", ["attention", "lora"])
def test_resume_is_exact(stage: str, source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = converted(source, text, tmp_path, "default")
    whole = distill(folder, data=str(text), stage=stage, output=tmp_path / "whole", **SHORT).path
    with monkeypatch.context() as patch:
        stop_at(9, patch)
        with pytest.raises(Interrupted) as stopped:
            distill(folder, data=str(text), stage=stage, output=tmp_path / "parts", **SHORT)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert not (tmp_path / "parts").exists()
    parts = distill(folder, data=str(text), stage=stage, output=tmp_path / "parts", resume=True, **SHORT).path
    a, b = weights(whole), weights(parts)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("launched", [TORCHRUN, []], ids=["torchrun", "num-processes"])
def test_two_processes_train_one_model(launched: list[str], source: Path, text: Path, tmp_path: Path) -> None:
    """Two processes of one row a step give the gradients, so the weights, of one process with two rows."""
    folder = converted(source, text, tmp_path, "default")
    one = distill(folder, data=str(text), output=tmp_path / "one", batch=2, **SHORT).path
    command = [
        sys.executable, *launched, "-m", "linearize", "distill", str(folder), "--num-processes", "2",
        "--data", str(text), "--sequence", "64", "--tokens", str(64 * 24), "-o", str(tmp_path / "two"), "--json",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_PORT": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stages"][0]["processes"] == 2
    a, b = weights(one), weights(tmp_path / "two")
    for name in a:
        assert torch.allclose(a[name], b[name], atol=2e-4, rtol=1e-3), name


def test_another_number_of_processes_than_launched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    launch(3)
    with pytest.raises(UsageError, match="3 processes were launched: --num-processes 2"):
        launch(2)


def test_evaluation_shows_every_row(source: Path, text: Path, tmp_path: Path) -> None:
    folder = converted(source, text, tmp_path, "default")
    found = evaluate(folder, data=str(text), tokens=256, recall=False)
    names = [row["name"] for row in found.rows]
    assert names[:4] == ["teacher", "student", "student, far memory off", "student, window off"]
    assert any(name.endswith("alone") for name in names)
    assert found.row("teacher")["ratio"] == 1.0
    taught = distill(folder, data=str(text), **SHORT).path
    merged = evaluate(taught, data=str(text), tokens=256, recall=False)
    assert merged.row("teacher")["perplexity"] == pytest.approx(found.row("teacher")["perplexity"], rel=1e-5)
    assert merged.row("student")["perplexity"] != pytest.approx(found.row("student")["perplexity"], rel=1e-5)
