"""Whatever is raised ends in two lines and its exit code; a traceback only with --debug."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.tiny import Cli, environment
from safetensors import SafetensorError

from linearize.cli.exits import Terminated, state_folder
from linearize.errors import HubError, IntegrityError, Interrupted, LinearizeError, TrainingError

from .fault import check

Raise = Callable[[BaseException], None]
COMMAND = ("plan", "tiny")


@pytest.fixture
def raised(monkeypatch: pytest.MonkeyPatch) -> Raise:
    """Make `linearize plan` raise this."""

    def arrange(error: BaseException) -> None:
        def fail(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr("linearize.conversion.plan.make_plan", fail)

    return arrange


@pytest.mark.parametrize(
    "error, code, line",
    [
        (HubError("gone", "x/y", "look elsewhere"), 7, "error: gone: x/y"),
        (IntegrityError("two\nlines", "here"), 8, "error: two lines: here"),
        (TrainingError("not finite", "step 3"), 6, "error: not finite: step 3"),
        (Interrupted(2, "attention, step 3 of 9"), 130, "stopped, state saved"),
        (OSError(errno.ENOSPC, "No space left on device", "/full/a.txt"), 5, "error: No space left on device: /full/a.txt"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 5, "error: Permission denied: /root/x"),
        (MemoryError(), 5, "error: out of memory"),
        (ValueError("LINEARIZE_BACKEND must be one of auto, got 'x'"), 2, "error: LINEARIZE_BACKEND must be one of auto, got 'x'"),
        (SafetensorError("invalid header"), 8, "error: weights cannot be read: invalid header"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_kind_has_its_code(cli: Cli, raised: Raise, error: Exception, code: int, line: str) -> None:
    raised(error)
    check(cli(*COMMAND), code, line)


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130), (Terminated(), 143)], ids=["ctrl-c", "sigterm"])
def test_signals_leave_quietly(cli: Cli, raised: Raise, error: BaseException, code: int) -> None:
    raised(error)
    done = cli(*COMMAND)
    assert (done.code, done.out, done.err) == (code, "", "stopped\n")


def test_a_bug_is_logged_and_its_traceback_kept_for_debug(
    cli: Cli, raised: Raise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    raised(RuntimeError("surprise"))
    check(cli(*COMMAND), 1, "error: internal error: RuntimeError: surprise", "--debug")
    assert "Traceback" in (state_folder() / "error.log").read_text()
    done = cli(*COMMAND, "--debug")
    assert done.code == 1
    assert "Traceback" in done.err
    assert str(tmp_path) in done.err.splitlines()[-1]


def test_a_bug_is_told_even_where_no_log_can_be_written(
    cli: Cli, raised: Raise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    raised(RuntimeError("surprise"))
    check(cli(*COMMAND), 1, "RuntimeError: surprise", "please report it")


def test_only_the_first_process_of_a_launch_speaks(cli: Cli, raised: Raise, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert cli("methods").out == ""
    raised(LinearizeError("wrong"))
    done = cli(*COMMAND)
    assert (done.code, done.out, done.err) == (1, "", "")
    raised(RuntimeError("surprise"))
    assert "error: internal error (rank 1): RuntimeError: surprise" in cli(*COMMAND).err


@pytest.mark.parametrize(("words", "code"), [("methods --json", 0), ("methods nosuch", 2)])
def test_one_process_of_many_waits_for_no_thread(words: str, code: int) -> None:
    """Its end is not the interpreter's, which a thread of gloo can abort; what it printed, atexit and its code are kept."""
    program = """if True:
        import atexit, sys, threading, time
        from linearize.cli import main
        threading.Thread(target=time.sleep, args=(600,)).start()
        atexit.register(print, "handlers ran")
        sys.exit(main())"""
    command = [sys.executable, "-c", program, *words.split()]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(WORLD_SIZE="2", RANK="0"), timeout=60, check=False
    )
    assert done.returncode == code
    assert done.stdout.endswith("handlers ran\n")
    assert len(done.stdout if code == 0 else done.stderr) > 20
