"""The same fixtures as the command line's own tests, and a folder of copies for each fault to spoil."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cli.conftest import book, cli, converted, home, model

__all__ = ["book", "cli", "converted", "home", "model"]


@pytest.fixture
def here(tmp_path: Path, model: Path, converted: Path, book: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with copies: the model `tiny`, its checkpoint `tiny-default`, the text `book.txt`."""
    shutil.copytree(model, tmp_path / "tiny")
    shutil.copytree(converted, tmp_path / "tiny-default")
    shutil.copyfile(book, tmp_path / "book.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path
