"""The scripts in examples/ run, and the method there is a package that installs and enrols itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
METHOD = EXAMPLES / "new_method" / "elu_window.py"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}

USE = """
import torch
from linearize import convert_model
from linearize.methods import make, names
from linearize.testing import tiny_llama
from linearize.testing.laws import LAWS
assert "elu-window" in names()
spec = make("elu-window", {"window": 4, "sinks": 2}).mixer()
for law in ("equations", "split", "handover", "state_size"):
    LAWS[law](spec, 2)
model = convert_model(tiny_llama(), method="elu-window", options={"window": 4}, calibration=torch.randint(2, 64, (2, 32)))
print(model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False).shape)
"""


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def with_project(*folders: Path) -> str:
    return os.pathsep.join(str(folder) for folder in (*folders, ROOT))


def test_convert_in_memory() -> None:
    said = run(sys.executable, EXAMPLES / "convert_in_memory.py", PYTHONPATH=with_project())
    sizes = re.findall(r"(\d+) bytes", said)
    assert len(sizes) == 3
    assert len(set(sizes)) == 1


def test_finetune_with_peft() -> None:
    said = run(sys.executable, EXAMPLES / "finetune_with_peft.py", PYTHONPATH=with_project())
    losses = [float(x) for x in re.findall(r"'loss': '?([0-9.]+)", said)]
    assert losses[-1] < losses[0]
    assert "the same after loading: True" in said


def test_a_method_is_at_most_thirty_lines() -> None:
    assert len(METHOD.read_text(encoding="utf-8").splitlines()) <= 30


@pytest.mark.slow
def test_a_method_of_ones_own(tmp_path: Path) -> None:
    """Installed as any package, it is listed, obeys the laws, and converts."""
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(EXAMPLES / "new_method", source)
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        target,
        source,
    )
    here = with_project(target)
    assert "elu-window" in run(sys.executable, "-m", "linearize", "methods", PYTHONPATH=here)
    assert "torch.Size([1, 11])" in run(sys.executable, "-c", USE, PYTHONPATH=here)
