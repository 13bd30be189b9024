"""Progress on a terminal: a bar for each stage with the time left and its figures; in a log, lines."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .tiny import environment

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def on_a_terminal(*arguments: object) -> str:
    """What a terminal of 160 columns is sent on stderr."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "linearize", *map(str, arguments)]
    env = environment(COLUMNS="160", TERM="xterm", OMP_NUM_THREADS="1")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, stdin=subprocess.DEVNULL, env=env)
    os.close(theirs)
    said = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux, when the other side is closed
            break
        if not piece:
            break
        said += piece
    os.close(ours)
    assert process.wait(timeout=100) == 0, said.decode()
    return ESCAPES.sub("", said.decode())


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_bar_for_each_stage(converted: Path, book: Path, tmp_path: Path) -> None:
    said = on_a_terminal("distill", converted, "--data", book, "--tokens", "640", "--sequence", "64", "-o", tmp_path / "taught")
    bars = re.findall(r"distill: (\w+) \S+ +(\d+)% eta (\S+) (.*?)(?=[\r\n]|distill:)", said)
    assert {stage for stage, *_ in bars} == {"attention", "lora"}
    last = {stage: (share, figures) for stage, share, _, figures in bars}
    assert all(share == "100" for share, _ in last.values())
    for stage, (_, figures) in last.items():
        assert re.search(r"loss=[\d.]+ tokens=640 tok/s=\d+ memory=[\d.]+ GB", figures), figures
        assert ("worst=layer " in figures) == (stage == "attention")
    assert any(re.fullmatch(r"\d+:\d\d(:\d\d)?", eta) for _, _, eta, _ in bars)
    assert "distill: attention  trained=mixers" in said
