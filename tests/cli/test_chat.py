"""Talking: answers from a pipe, commands, and Ctrl-C on a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cli.tiny import Cli, environment, spawn
from linearize.cli import talk
from linearize.cli.console import Console

STATS = re.compile(r"\d+ tok · .* tok/s · prefill .* tok/s · state .*B · KV would be .*B")
DEADLINE = 60.0


class Parrot:
    """A session that says what it hears, for the loop's own tests."""

    def __init__(self) -> None:
        self.history: list[dict[str, str]] = []
        self.system: str | None = None
        self.last: dict[str, Any] = {}

    def ask(self, text: str, settings: object) -> Iterator[str]:
        self.history += [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        yield from text

    def undo(self) -> None:
        del self.history[-2:]

    def reset(self) -> None:
        self.history.clear()

    def stop(self) -> None:
        raise AssertionError("nobody pressed Ctrl-C")


def listen(monkeypatch: pytest.MonkeyPatch, lines: str) -> Parrot:
    parrot = Parrot()
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    talk.Talk(parrot, None, Console(), interactive=False).run()  # type: ignore[arg-type]
    return parrot


def test_a_pipe_gets_the_answers_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    listen(monkeypatch, 'one\n\n"""two\nthree"""\n/quit\nfour\n')
    captured = capsys.readouterr()
    assert captured.out == "one\ntwo\nthree\n"
    assert captured.err == ""


def test_commands_answer_on_stderr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    parrot = listen(monkeypatch, "/help\n/undo\nhi\n/undo\n/sytem\n/system Be brief.\n/system\n/xyzzy\nho\n/stats\n/reset\n")
    captured = capsys.readouterr()
    assert captured.out == "hi\nho\n"
    lines = captured.err.splitlines()
    assert [line.split()[0] for line in lines[: len(talk.COMMANDS)]] == list(talk.COMMANDS)
    assert lines[len(talk.COMMANDS) :] == [
        "there is nothing to take back",
        "the last message is taken back",
        "unknown command /sytem; did you mean /system?",
        "the system prompt is set and the talk starts anew",
        "Be brief.",
        "unknown command /xyzzy; see /help",
        "answers: 1",
        "no answer yet",
        "the talk is forgotten",
    ]
    assert parrot.history == []


def test_bytes_that_are_not_utf8_reach_the_model_as_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parrot = listen(monkeypatch, "caf\udce9\n")
    assert parrot.history[0]["content"] == "caf�"


def test_ctrl_d_leaves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed = iter(["hi"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed, None) or end_of_file())
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    parrot = Parrot()
    parrot.last = {
        "tokens": 2,
        "tokens_per_second": None,
        "prefill_tokens_per_second": 1234.0,
        "state_bytes": 2000,
        "kv_bytes": 400,
    }
    talk.Talk(parrot, None, Console(), interactive=True).run()  # type: ignore[arg-type]
    captured = capsys.readouterr()
    assert captured.out == "hi\n\n"
    assert captured.err.splitlines()[-1] == "2 tok · - tok/s · prefill 1.2 K tok/s · state 2.0 KB · KV would be 400 B"


def end_of_file() -> str:
    raise EOFError


def test_piped_chat_with_a_model(cli: Cli, converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("The sea\nThe night\n"))
    done = cli("chat", converted, "--max-tokens", "8")
    assert done.code == 0, done.err
    assert done.err == ""
    assert done.out.count("\n") >= 2


def test_generate(cli: Cli, converted: Path) -> None:
    done = cli("generate", converted, "--prompt", "The sea is", "--max-tokens", "8")
    assert done.code == 0, done.err
    assert STATS.search(done.err)
    found = json.loads(cli("generate", converted, "--prompt", "The sea is", "--max-tokens", "8", "--json").out)
    assert found["text"] == done.out.removesuffix("\n")
    assert found["tokens"] <= 8
    assert found["state_bytes"] > 0


def test_a_process_of_its_own_prints_the_text_and_one_line_of_stats(converted: Path) -> None:
    done = spawn("generate", converted, "--prompt", "The sea is", "--max-tokens", "8")
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert STATS.match(done.stderr)


def test_generate_with_a_seed_repeats_itself(cli: Cli, converted: Path) -> None:
    arguments = ("generate", converted, "--prompt", "The sea", "--max-tokens", "8", "--temp", "1.5", "--json")
    first, again, other = (json.loads(cli(*arguments, "--seed", seed).out)["text"] for seed in ("1", "1", "2"))
    assert first == again != other


def test_generate_reads_stdin_and_uses_the_template(cli: Cli, converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("The sea"))
    done = cli("generate", converted, "--prompt", "-", "--chat", "--max-tokens", "4", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["prompt"] == "The sea"


class Terminal:
    """`linearize ARGUMENTS` on a pseudo-terminal."""

    def __init__(self, *arguments: object, **settings: str) -> None:
        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "linearize", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment(TERM="xterm", **settings), start_new_session=True,
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores Ctrl-C
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def until(self, pattern: str, signal_number: int = 0) -> str:
        """Read until the pattern shows; returns what came since the last call.

        The signal is sent again each second: one that comes before readline waits is only seen at the next key.
        """
        end, again = time.monotonic() + DEADLINE, 0.0
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.seen!r}"
            if signal_number and time.monotonic() > again:
                self.process.send_signal(signal_number)
                again = time.monotonic() + 1
            if select.select([self.master], [], [], 0.2)[0]:
                self.seen += self.read()
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def read(self) -> str:
        try:
            return os.read(self.master, 4096).decode(errors="replace")
        except OSError as error:  # the other end is closed
            raise AssertionError(f"it ended with {self.process.wait()}: {self.seen!r}") from error

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


@pytest.fixture(scope="module")
def endless(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted model, with no token that ends an answer."""
    import shutil

    from linearize.checkpoint import write_manifest

    copy = tmp_path_factory.mktemp("endless") / "tiny"
    shutil.copytree(converted, copy)
    for name in ("config.json", "generation_config.json"):
        path = copy / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": None}))
    write_manifest(copy)
    return copy


def test_ctrl_c_stops_the_answer_and_keeps_the_talk(endless: Path, tmp_path: Path) -> None:
    terminal = Terminal("chat", endless, "--max-tokens", "1000000", XDG_STATE_HOME=str(tmp_path))
    try:
        terminal.until(">>> ")
        terminal.type("The sea is\n")
        terminal.until(r"The sea is\r\n.{20}")
        terminal.process.send_signal(signal.SIGINT)
        assert "stopped · " in terminal.until(r"KV would be .*>>> ")
        terminal.type("/stats\n")
        terminal.until(r"answers: 1.*>>> ")
        terminal.until(r"Ctrl-D leaves.*>>> ", signal.SIGINT)
        terminal.until("stopped", signal.SIGTERM)
        assert terminal.process.wait(timeout=30) == 143
    finally:
        terminal.process.kill()
        os.close(terminal.master)
    assert "The sea is" in (tmp_path / "linearize" / "chat_history").read_text()
