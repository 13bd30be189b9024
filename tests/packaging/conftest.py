"""The wheel, and two real virtual environments: one with the wheel installed, one that has torch and transformers only."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from environments import CLEAN, Environment, make_environment

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built from a copy without what earlier builds left."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("linearize", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(output), str(source)]
    made = subprocess.run(command, text=True, capture_output=True, check=False, env=CLEAN)
    assert made.returncode == 0, f"{made.stdout}\n{made.stderr}"
    return next(output.glob("*.whl"))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment in which pip installed the wheel."""
    requires = ["torch", "transformers", "peft", "accelerate", "safetensors", "typer", "rich", "pyyaml"]
    made = make_environment(tmp_path_factory.mktemp("installed"), requires)
    pip = [sys.executable, "-m", "pip", "--python", str(made.python), "install", "--no-index", "--no-deps", "--quiet", str(wheel)]
    done = subprocess.run(pip, text=True, capture_output=True, check=False, env={**CLEAN, "PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    assert done.returncode == 0, done.stderr
    return made


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with torch, transformers and what they need: no linearize, no peft, no accelerate."""
    return make_environment(tmp_path_factory.mktemp("bare"), ["torch", "transformers"])
