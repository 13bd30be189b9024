"""Two processes are one process with twice the batch: data parallel, sharded, sharing rows; both stages, unequal targets."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import many
import pytest
import torch
from cli.tiny import TEXT, environment, write_model
from safetensors.torch import load_file
from torch import Tensor

from linearize.conversion.convert import convert

HERE = Path(__file__).parent
STAGES = ["attention", "lora"]
WAYS = ["", "-shard", "-checkpointing", "-shard-checkpointing", "-parts", "-parts-shard", "-parts-checkpointing"]
CASES = [f"{stage}-float64{way}" for stage in STAGES for way in WAYS] + [f"{stage}-float32" for stage in STAGES]
CASES += [f"{stage}-float32-shard" for stage in STAGES] + ["lora-float32-shard-bf16-checkpointing"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("source")
    (where / "book.txt").write_text(TEXT, encoding="utf-8")
    given = write_model(where / "tiny")
    return convert(str(given), output=where / "linear", calibration=where / "book.txt", options={"window": 8}).path


@pytest.fixture(scope="module")
def two(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made of all cases."""
    output = tmp_path_factory.mktemp("two")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(HERE / "many.py")]
    done = subprocess.run(
        [sys.executable, *launch, str(folder), str(output), *CASES],
        capture_output=True, text=True, env=environment(), timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return output


@pytest.fixture(scope="module")
def one(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Tensor]]:
    """What one process makes of a stage in a dtype."""
    output = tmp_path_factory.mktemp("one")

    @cache
    def made(case: str) -> dict[str, Tensor]:
        many.train(folder, output, case)
        return load_file(output / f"{case}.safetensors")

    return made


def plain(case: str) -> str:
    return "-".join(case.split("-")[:2])


def error(a: dict[str, Tensor], b: dict[str, Tensor], gradients: bool) -> float:
    """Relative RMSE of all gradients, or of all parameters."""
    names = [name for name in a if name.startswith("grad.") == gradients]
    assert names
    assert a.keys() == b.keys()
    off = sum(float((a[name].double() - b[name].double()).square().sum()) for name in names)
    return float((off / sum(float(a[name].double().square().sum()) for name in names)) ** 0.5)


def test_the_processes_have_unequal_numbers_of_targets() -> None:
    counts = (many.rows().positions > 0).sum(1)
    assert set(counts.tolist()) == {16, 31}


@pytest.mark.parametrize("case", [case for case in CASES if "float64" in case])
def test_two_processes_are_one_with_twice_the_batch(case: str, one: Callable[[str], dict[str, Tensor]], two: Path) -> None:
    """20 steps in fp64."""
    found, wanted = load_file(two / f"{case}.safetensors"), one(plain(case))
    assert error(wanted, found, gradients=False) < 1e-9
    assert error(wanted, found, gradients=True) < 1e-9
    moved = [name for name in wanted if name.startswith("grad.") and bool(wanted[name].any())]
    assert len(moved) > len(wanted) // 4, "most of what is trained has gradients"


@pytest.mark.parametrize("case", [case for case in CASES if "float32" in case and "bf16" not in case])
def test_first_gradients_in_fp32(case: str, one: Callable[[str], dict[str, Tensor]], two: Path) -> None:
    assert error(one(plain(case)), load_file(two / f"{case}.safetensors"), gradients=True) < 1e-5


def test_mixed_precision(one: Callable[[str], dict[str, Tensor]], two: Path) -> None:
    """What is trained stays fp32, and its gradients are near those of fp32 but not they."""
    found, wanted = load_file(two / "lora-float32-shard-bf16-checkpointing.safetensors"), one("lora-float32")
    assert {x.dtype for x in found.values()} == {torch.float32}
    assert 1e-4 < error(wanted, found, gradients=True) < 0.1
