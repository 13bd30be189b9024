"""A run that is killed, that meets losses which are not finite, that is begun anew over another: nothing is lost, all is exact."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.tiny import TEXT, environment, write_model
from safetensors.torch import load_file

from linearize.cli import run as command
from linearize.conversion.convert import convert
from linearize.distillation import loop, stages
from linearize.distillation.layer_losses import LayerCall
from linearize.distillation.run import distill
from linearize.distillation.state import check_same, states
from linearize.errors import InputError, ResourceError, TrainingError, UsageError
from linearize.methods.base import Stage

LENGTH, STEPS = 32, 40
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    given = write_model(tmp_path_factory.mktemp("source") / "tiny")
    return convert(str(given), output=given.parent / "linear", calibration=text, options={"window": 8}).path


def weights(where: Path) -> dict[str, torch.Tensor]:
    return load_file(where / "model.safetensors")


def lines(where: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]


def killed(folder: Path, text: Path, output: Path, at: tuple[int, int, int], processes: int, *more: str) -> int:
    """The exit code of a run that is killed (rank, stage, step); what it said is printed, for a test that fails."""
    arguments = [str(x) for x in at] + [str(folder), "--data", str(text), "--sequence", str(LENGTH), "-o", str(output), *more]
    rows = 1 if "--sequence-parallel" in more else processes
    arguments += ["--tokens", str(LENGTH * STEPS * rows), "--save-every", "10", "--set", "stages.lora.dropout=0.3"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    done = subprocess.run(
        [sys.executable, *launch, str(HERE / "killed.py"), *arguments],
        capture_output=True, text=True, env=environment(), timeout=300, check=False,
    )  # fmt: skip
    print(done.stdout, done.stderr, sep="\n")
    return done.returncode


@pytest.fixture(scope="module")
def undisturbed(folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The checkpoint of a run that nothing stopped, by its processes and further flags."""

    @cache
    def made(processes: int, *more: str) -> Path:
        output = tmp_path_factory.mktemp("whole") / "out"
        assert killed(folder, text, output, (-1, 0, 0), processes, *more) == 0
        return output

    return made


def test_a_state_from_before_a_field_was_goes_on_where_the_field_is_as_by_default() -> None:
    stage = {key: list(x) if isinstance(x, tuple) else x for key, x in asdict(Stage("lora", 100, 1e-4)).items()}
    older = {key: x for key, x in stage.items() if key not in ("slot_share", "targets")}
    check_same({"stages": [older]}, {"stages": [stage]})
    for changed in ({**stage, "slot_share": 0.125}, {**stage, "lr": 1e-3}):
        with pytest.raises(InputError, match="the run was begun with stages"):
            check_same({"stages": [older]}, {"stages": [changed]})


CASES = [(1, (0, 0, 27), ()), (1, (0, 1, 27), ()), (2, (1, 1, 27), ()), (2, (1, 1, 27), ("--shard", "--gradient-checkpointing"))]
CASES += [(2, (1, 1, 27), ("--sequence-parallel",))]


@pytest.mark.parametrize("processes, at, more", CASES, ids=str)
def test_a_killed_run_goes_on_as_if_nothing_had_been(
    processes: int, at: tuple[int, int, int], more: tuple[str, ...], undisturbed: Callable[..., Path], folder: Path, text: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    """kill -9 after 27 steps, resumed from the 20th, LoRA with dropout: weights and losses to the bit, in each stage."""
    whole, parts = undisturbed(processes, *more), tmp_path / "parts"
    assert killed(folder, text, parts, at, processes, *more) != 0
    assert not parts.exists()
    if more:  # sharded moments are gathered when they are saved: the state is whole, and one process says why it does not take it
        with pytest.raises(InputError, match=r"the run was begun with processes 2, not 1.*--resume"):
            distill(folder, data=str(text), sequence=LENGTH, tokens=LENGTH * STEPS * 2, output=parts, resume=True)
    assert killed(folder, text, parts, (-1, 0, 0), processes, "--resume", "auto", *more) == 0
    one, other = weights(whole), weights(parts)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    first, second = ([(line["stage"], line["step"], line["loss"]) for line in lines(where)] for where in (whole, parts))
    assert len(first) == 2 * STEPS
    assert first == second


def test_dropout_is_drawn(folder: Path, text: Path, tmp_path: Path) -> None:
    """Without it the run above would say nothing of what is drawn."""
    given: dict[str, Any] = {"data": str(text), "stage": "lora", "sequence": LENGTH, "tokens": LENGTH * 3}
    made = [weights(distill(folder, sets=[f"stages.lora.dropout={p}"], output=tmp_path / str(p), **given).path) for p in (0.0, 0.3)]
    assert any(not torch.equal(made[0][name], made[1][name]) for name in made[0])


class Poison:
    """Makes the losses of some calls NaN, in a way that a real one would be: through the values of the network."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, calls: range | list[int]) -> None:
        self.count, real = 0, stages.LAYER_LOSSES["relative_mse"]

        def poisoned(call: LayerCall) -> torch.Tensor:
            self.count += 1
            step, layer = divmod(self.count - 1, 2)
            call.target = call.target * math.nan if step in calls and layer == 1 else call.target
            return real(call)

        monkeypatch.setitem(stages.LAYER_LOSSES, "relative_mse", poisoned)


def transfer(folder: Path, text: Path, output: Path, **more: Any) -> Any:
    return distill(
        folder, data=str(text), stage="attention", sequence=LENGTH, tokens=LENGTH * 20, save_every=5, output=output, **more
    )


def test_a_loss_that_is_not_finite_is_skipped(folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Poison(monkeypatch, [3, 7, 8])
    made = transfer(folder, text, tmp_path / "out")
    assert made.stages[0]["skipped"] == 3
    losses = [line["loss"] for line in lines(made.path)]
    assert [i for i, loss in enumerate(losses) if loss is None] == [3, 7, 8]
    assert all(bool(torch.isfinite(x).all()) for x in weights(made.path).values())
    kept = sorted((tmp_path / "out.run").rglob("*.safetensors"))
    assert [path.name for path in kept] == [f"attention-{step:08d}-0.safetensors" for step in (3, 7, 8)]
    assert load_file(kept[0])["ids"].shape == (1, LENGTH)


def test_several_in_a_row_bring_the_last_state_back_at_half_the_rate(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Poison(monkeypatch, [6, 7, 8])  # the state of step 5 comes back, and step 5 is the ninth call
    made = transfer(folder, text, tmp_path / "out")
    found = lines(made.path)
    assert [line["step"] for line in found] == list(range(1, 21))
    assert made.stages[0]["skipped"] == 3
    usual = lines(transfer(folder, text, tmp_path / "other").path)
    ratios = [line["rate"] / other["rate"] for line, other in zip(found, usual, strict=True)]
    assert ratios == pytest.approx([1.0] * 5 + [0.5] * 15)
    assert [line["loss"] for line in found[:6]] == [line["loss"] for line in usual[:6]]


def test_it_stops_when_that_does_not_help(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Poison(monkeypatch, range(7, 1000))
    output = tmp_path / "out"
    with pytest.raises(TrainingError, match=r"not finite 3 times in a row, again.*worst layer 1 \(") as failed:
        transfer(folder, text, output)
    assert failed.value.code == 6
    assert "skipped" in failed.value.fix
    assert not output.exists()
    for state in states(output.with_name("out.run")):
        assert all(bool(torch.isfinite(x).all()) for x in load_file(state / "parameters.safetensors").values())


def test_what_is_not_finite_is_never_saved(folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer's step may overflow where no loss did."""
    real, count = torch.optim.AdamW.step, 0

    def overflowing(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        found = real(self, *args, **kwargs)
        if count == 10:
            self.param_groups[0]["params"][0].data.fill_(math.inf)
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", overflowing)
    with pytest.raises(TrainingError, match="is not finite, nothing was saved"):
        transfer(folder, text, tmp_path / "out")
    assert [state.name for state in states(tmp_path / "out.run")] == ["step-0-00000000", "step-0-00000005"]


def test_an_interrupted_run_is_not_lost(folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        Poison(patch, range(7, 1000))
        with pytest.raises(TrainingError):
            transfer(folder, text, tmp_path / "out", keep=1)
    assert len(states(tmp_path / "out.run")) == 1
    with pytest.raises(InputError, match="a run was interrupted here"):
        transfer(folder, text, tmp_path / "out")
    assert len(states(tmp_path / "out.run")) == 1
    assert transfer(folder, text, tmp_path / "out", overwrite=True).stages[0]["skipped"] == 0


def test_a_stopped_run_prints_the_command_that_goes_on(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = loop.Trainer._step

    def stopping(self: Any, *args: Any) -> float:
        if args[-1] == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args)

    given = ["distill", str(folder), "--data", str(text), "--sequence", str(LENGTH), "--tokens", "200", "-o", str(tmp_path / "a b")]
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_step", stopping)
        assert command(given) == 130
    fix = capsys.readouterr().err.splitlines()[-1]
    assert fix.startswith("fix: linearize distill ")
    assert fix.endswith("-o '" + str(tmp_path / "a b") + "' --resume auto")
    assert command([*given, "--resume", "auto"]) == 0
    assert command([*given, "--resume", "auto", "--overwrite"]) == 0, "auto begins anew where there is nothing to go on with"


def test_a_tracker_is_told_every_step(folder: Path, text: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    given: dict[str, Any] = {"data": str(text), "sequence": LENGTH, "tokens": LENGTH * 4, "report_to": ["tensorboard"]}
    made = distill(folder, output=tmp_path / "out", **given)
    seen = EventAccumulator(str(next((tmp_path / "out.logs").rglob("events.*")).parent)).Reload()
    for stage, first in (("attention", 1), ("lora", 5)):
        own = [line["loss"] for line in lines(made.path) if line["stage"] == stage]
        assert [event.step for event in seen.Scalars(f"{stage}/loss")] == list(range(first, first + 4))
        assert [event.value for event in seen.Scalars(f"{stage}/loss")] == pytest.approx(own)


def test_a_tracker_that_is_missing_is_no_silence(folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "get_available_trackers", list)
    with pytest.raises(ResourceError, match="wandb is not installed") as missing:
        transfer(folder, text, tmp_path / "out", report_to=["wandb"])
    assert missing.value.fix == "pip install wandb"
    with pytest.raises(UsageError, match="unknown tracker 'wand'"):
        transfer(folder, text, tmp_path / "out", report_to=["wand"])
