"""The scripts in examples/ run, and the method there is a package that installs and enrols itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli.tiny import TEXT, write_model

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
spec = make("elu-window", {"window": 4, "sinks": 2}).point()
for law in ("equations", "split", "handover", "state_size"):
    LAWS[law](spec, 2)
model = convert_model(tiny_llama(), method="elu-window", options={"window": 4}, calibration=torch.randint(2, 64, (2, 32)))
print(model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False).shape)
"""


def run(*command: str | Path, said: str | None = None, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        input=said,
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

    model, made = write_model(tmp_path / "tiny"), tmp_path / "made"
    book = tmp_path / "book.txt"
    book.write_text(TEXT, encoding="utf-8")
    command = (sys.executable, "-m", "linearize")
    convert = ("convert", model, "--method", "elu-window", "--set", "window=8", "--calibration", book, "-o", made)
    run(*command, *convert, PYTHONPATH=here)
    run(*command, "distill", made, "--data", book, "--sequence", "64", "--tokens", "128", PYTHONPATH=here)
    taught = made.with_name("made-distilled")
    assert "elu-window" in run(*command, "inspect", taught, PYTHONPATH=here)
    assert run(*command, "chat", taught, "--max-tokens", "8", PYTHONPATH=here, said="Once").strip()


@pytest.mark.slow
def test_methods_compared(tmp_path: Path) -> None:
    """A method alone, one with a window and a pattern, on a tiny model; what is done is not done again."""
    model = write_model(tmp_path / "tiny")
    command = (sys.executable, ROOT / "recipes" / "compare_methods.py", "--model", model, "--tokens", "2048", "--evaluate", "1")
    options = ("--results", tmp_path / "results")
    said = run(*command, *options, "hedgehog", "default", "liger-h", PYTHONPATH=with_project())
    rows = {row.split("`")[1]: row.split("|")[2:-1] for row in said.splitlines() if row.startswith("| `")}
    assert set(rows) == {"hedgehog", "default", "liger-h"}
    assert all(after != before for _, before, after, *_ in rows.values()), "nothing was learnt"
    assert rows["default"][3].strip()
    assert not rows["hedgehog"][3].strip(), "a memory alone has nothing left without its far half"
    again = run(*command, *options, "hedgehog", PYTHONPATH=with_project())
    assert "step" not in again
    assert "`default`" in again
