"""Which forms of launching train one model in many processes, and what the others are told."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli.tiny import TEXT, environment, write_model
from safetensors.torch import load_file

from linearize.conversion.convert import convert
from linearize.distillation.launching import check_joined, meant
from linearize.distillation.run import distill
from linearize.distillation.streaming import Streaming
from linearize.errors import ResourceError, UsageError

TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
TOLD = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
ACCELERATE = ["-m", "accelerate.commands.launch"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("source")
    (where / "book.txt").write_text(TEXT, encoding="utf-8")
    given = write_model(where / "tiny")
    return convert(str(given), output=where / "linear", calibration=where / "book.txt", options={"window": 8}).path


def arguments(folder: Path, output: Path, *more: str) -> list[str]:
    given = ["-m", "linearize", "distill", str(folder), "--data", str(folder.parent / "book.txt"), "--sequence", "32"]
    return [*given, "--tokens", "256", "-o", str(output), "--json", *more]


def started(*command: str) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *command], text=True, env=environment(), **pipes)  # type: ignore[call-overload, no-any-return]


def processes_of(done: str) -> int:
    return int(json.loads(done)["stages"][0]["processes"])


@pytest.mark.parametrize(
    "said, number", [({}, 1), (TORCHRUN, 2), ({"OMPI_COMM_WORLD_SIZE": "4"}, 4), ({"ACCELERATE_MIXED_PRECISION": "no"}, 1)], ids=str
)
def test_what_launchers_mean(said: dict[str, str], number: int) -> None:
    assert meant(said) == number


@pytest.mark.parametrize(
    "said, what",
    [
        (TOLD, "asked for several processes and started one"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "srun started 2 processes"),
        ({"WORLD_SIZE": "2"}, "but not RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "1"}, "but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
    ],
    ids=str,
)
def test_processes_that_would_train_alone_are_refused(said: dict[str, str], what: str) -> None:
    with pytest.raises(ResourceError, match=what) as refused:
        meant(said)
    assert "torchrun --nproc_per_node N -m linearize distill DIR" in refused.value.fix


def test_all_must_join() -> None:
    check_joined(2, 2)
    with pytest.raises(ResourceError, match="started 2 processes, but only 1 joined"):
        check_joined(2, 1)


def test_sharding_needs_processes(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one process") as refused:
        distill(folder, data=str(folder.parent / "book.txt"), sequence=32, output=tmp_path / "out", shard=True)
    assert "--num-processes 2" in refused.value.fix
    with pytest.raises(UsageError, match="--mixed-precision"):
        distill(folder, output=tmp_path / "out", precision="bfloat16")


def test_accelerate_that_starts_one_process(folder: Path, tmp_path: Path) -> None:
    running = started(*ACCELERATE, "--cpu", "--num_processes", "2", *arguments(folder, tmp_path / "out"))
    _, said = running.communicate(timeout=100)
    assert running.returncode != 0
    assert "asked for several processes and started one" in said
    assert not (tmp_path / "out").exists()


def test_a_sharded_run_writes_what_an_unsharded_one_does(folder: Path, tmp_path: Path) -> None:
    """The same names, the same config but for the record of the stages, and nothing but what was trained is different."""
    running = started(*arguments(folder, tmp_path / "shard", "--shard", "--num-processes", "2"))
    out, said = running.communicate(timeout=100)
    assert running.returncode == 0, said
    assert processes_of(out) == 2
    one = distill(folder, data=str(folder.parent / "book.txt"), sequence=32, tokens=256, batch=2, output=tmp_path / "one").path
    a, b = (load_file(path / "model.safetensors") for path in (one, tmp_path / "shard"))
    assert {name: (x.shape, x.dtype) for name, x in a.items()} == {name: (x.shape, x.dtype) for name, x in b.items()}
    before = load_file(folder / "model.safetensors")
    assert all((a[name] - b[name]).abs().max() < 2e-4 for name in a)
    assert any(bool((b[name] != before[name]).any()) for name in b if "q_proj" in name), "the adapter was merged"
    assert all(bool((b[name] == before[name]).all()) for name in b if "mlp" in name or "embed" in name)
    first, second = (json.loads((path / "config.json").read_text(encoding="utf-8")) for path in (one, tmp_path / "shard"))
    assert {**first, "linearize": 0} == {**second, "linearize": 0}
    assert "FSDP" not in json.dumps(second)


def test_processes_that_share_rows_write_what_one_writes(folder: Path, tmp_path: Path) -> None:
    running = started(*arguments(folder, tmp_path / "two", "--sequence-parallel", "--num-processes", "2"))
    out, said = running.communicate(timeout=100)
    assert running.returncode == 0, said
    for stage in json.loads(out)["stages"]:
        assert (stage["processes"], stage["sequence_parallel"], stage["tokens"], stage["steps"]) == (2, True, 256, 8)
    one = distill(folder, data=str(folder.parent / "book.txt"), sequence=32, tokens=256, output=tmp_path / "one").path
    a, b = (load_file(path / "model.safetensors") for path in (one, tmp_path / "two"))
    assert a.keys() == b.keys()
    assert all((a[name] - b[name]).abs().max() < 2e-4 for name in a)
    losses = [[json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (one, tmp_path / "two")]
    for mine, other in zip(*losses, strict=True):
        assert other["loss"] == pytest.approx(mine["loss"], rel=1e-4)
        assert other["layers"] == pytest.approx(mine["layers"], rel=1e-4)
        assert other["tokens"] == mine["tokens"]


@pytest.mark.parametrize(
    "given, what",
    [
        ({}, "one process has nobody to share a row with"),
        ({"streaming": Streaming(1), "stage": "attention"}, "one after another: --sequence-parallel"),
    ],
    ids=str,
)
def test_sharing_rows_needs_processes_and_a_whole_model(given: dict[str, Any], what: str, folder: Path, tmp_path: Path) -> None:
    data = str(folder.parent / "book.txt")
    with pytest.raises(UsageError, match=what):
        distill(folder, data=data, sequence=32, output=tmp_path / "out", sequence_parallel=True, **given)


@pytest.mark.exhaustive
def test_accelerate_that_starts_two_processes(folder: Path, tmp_path: Path) -> None:
    running = started(*ACCELERATE, "--multi_gpu", "--num_processes", "2", *arguments(folder, tmp_path / "out", "--device", "cpu"))
    out, said = running.communicate(timeout=200)
    assert running.returncode == 0, said
    assert processes_of(out[out.index("{") :]) == 2


@pytest.mark.exhaustive
def test_two_nodes(folder: Path, tmp_path: Path) -> None:
    """Two agents of torchrun, one process each, that meet on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "a"]
    nodes += ["--rdzv-endpoint", f"127.0.0.1:{port}"]
    both = [started(*nodes, *arguments(folder, tmp_path / "out", "--shard")) for _ in range(2)]
    said = [running.communicate(timeout=200) for running in both]
    assert [running.returncode for running in both] == [0, 0], said
    assert processes_of("".join(out for out, _ in said)) == 2
