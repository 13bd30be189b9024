"""Fixtures of a tiny model, its converted checkpoint and the command line in process."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.utils import logging

from cli.tiny import TEXT, Cli, write_model
from linearize.cli import run


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """History and logs go to a folder of the tests' own."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("COLUMNS", "100")
    logging.disable_progress_bar()  # transformers is imported before the command line could say so


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def converted(model: Path, book: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, converted with the default method."""
    output = tmp_path_factory.mktemp("converted") / "tiny-default"
    assert run(["convert", str(model), "-o", str(output), "--set", "window=8", "--calibration", str(book), "--json"]) == 0
    return output
