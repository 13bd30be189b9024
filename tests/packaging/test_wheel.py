"""The wheel: what is in it, and that it works where nothing else of this tree is."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

import pytest
from cli.tiny import write_model
from environments import Environment

ROOT = Path(__file__).resolve().parents[2]


def test_contents(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, suffixes in (("linearize", ".py"), ("recipes", ".md .yaml")):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in suffixes.split() and "__pycache__" not in path.parts:
                inside = path.relative_to(ROOT).as_posix()
                assert (inside if folder == "linearize" else f"linearize/{inside}") in names
    assert "linearize/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"linearize", f"{wheel.name.split('-py3')[0]}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    name = next(name for name in archive.namelist() if name.endswith("METADATA"))
    text = archive.read(name).decode()
    assert "License-Expression: Apache-2.0" in text
    assert re.search(r"^Requires-Dist: transformers", text, re.MULTILINE)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


def test_methods(installed: Environment, tmp_path: Path) -> None:
    found = json.loads(installed.run("linearize", "methods", "--json", cwd=tmp_path).stdout)
    assert {"default", "hedgehog", "lawcat", "liger", "lolcats"} <= {method["name"] for method in found}
    assert "linearize 0" in installed.run("linearize", "--version", cwd=tmp_path).stdout


def test_it_is_the_wheel_that_runs(installed: Environment, tmp_path: Path) -> None:
    where = installed.run("python", "-c", "import linearize; print(linearize.__file__)", cwd=tmp_path).stdout
    assert Path(where.strip()).is_relative_to(installed.root)


def test_convert_and_generate(installed: Environment, tiny: Path, tmp_path: Path) -> None:
    installed.run("linearize", "convert", tiny, "--set", "window=8", "-o", "made", cwd=tmp_path)
    runtime = {path.name for path in (ROOT / "linearize" / "modeling").glob("*.py")} - {"__init__.py"}
    assert runtime <= {path.name for path in (tmp_path / "made").iterdir()}
    said = installed.run("linearize", "generate", "made", "--prompt", "The sea is", "--max-tokens", "4", "--json", cwd=tmp_path)
    assert json.loads(said.stdout)["text"]
