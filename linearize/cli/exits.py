"""From an exception to two lines on stderr and an exit code."""

from __future__ import annotations

import atexit
import errno
import os
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import typer

from linearize.errors import LinearizeError

# UsageError and ClickException: typer carries its own click or uses the installed one, by version
CLICK_ERRORS: tuple[type[Exception], ...] = typer.BadParameter.__mro__[1:3]
FIXES = {
    2: "see: linearize --help",
    3: "correct the input and run the command again",
    4: "convert another model: linearize convert --help",
    5: "free some of it and run the command again",
    6: "run the command again with a lower learning rate or another --seed",
    7: "check the network, or give a local folder as MODEL",
    8: "delete the file and fetch it again",
}
RESOURCES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ESTALE, errno.ENOMEM)


class Terminated(KeyboardInterrupt):
    """SIGTERM: whatever saves its work on Ctrl-C saves it here too."""


def rank() -> int:
    """Which process of a torchrun launch this is; 0 prints."""
    return int(os.environ.get("RANK", "0"))


def end(code: int) -> NoReturn:
    """End one process of many without taking the interpreter down: gloo's threads may still hold tensors, whose release then aborts
    it (pytorch/pytorch#179291)."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def state_folder() -> Path:
    """Where the chat's history and the log of internal errors live."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "linearize"


def report(error: BaseException, debug: bool = False) -> int:
    """Tell the user of this exception, and return the exit code."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        if rank() == 0:
            print("stopped", file=sys.stderr)
        return 143 if isinstance(error, Terminated) else 130
    known = translate(error)
    if known is None:
        return internal(error, debug)
    code, what, fix = known
    if rank() == 0:
        tell(what, fix or FIXES.get(code, FIXES[2]))
    return code


def tell(what: str, fix: str) -> None:
    """The two lines of every error."""
    for label, text in (("error", what), ("fix", fix)):
        print(f"{label}: {' '.join(text.split())}", file=sys.stderr)


def translate(error: BaseException) -> tuple[int, str, str] | None:
    """(code, what, fix) of an exception that a user can do something about."""
    if isinstance(error, LinearizeError):
        return error.code, str(error), error.fix
    if isinstance(error, CLICK_ERRORS):
        return usage(error)
    name, module = type(error).__name__, type(error).__module__
    if module.startswith("huggingface_hub"):
        return 7, f"the hub refused: {first_line(error)}", ""
    if name == "SafetensorError":
        return 8, f"weights cannot be read: {first_line(error)}", ""
    if isinstance(error, MemoryError) or name == "OutOfMemoryError":
        return 5, f"out of memory: {first_line(error) or 'the process'}", "use a smaller --sequence, or --device cpu"
    if isinstance(error, OSError) and error.errno in RESOURCES:
        return 5, f"{error.strerror}: {error.filename or 'a file'}", "write elsewhere with -o, or correct its permissions"
    if isinstance(error, ValueError) and "max_length=" in str(error):
        return 3, first_line(error), "shorten the text, or convert again with a larger --set max_length=N"
    if isinstance(error, ValueError) and "learned positions" in str(error):
        return 3, first_line(error), "shorten the text; for distill, a smaller --sequence"
    if isinstance(error, ValueError) and str(error).startswith("LINEARIZE_BACKEND"):
        return 2, first_line(error), "set another, or unset it"
    if isinstance(error, ValueError) and raised_by_a_plan(error):
        return 8, f"the checkpoint's plan cannot be read: {first_line(error)}", "write it again: linearize convert MODEL"
    return None


def usage(error: Any) -> tuple[int, str, str]:
    """A mistake in flags, as typer words it."""
    path = getattr(getattr(error, "ctx", None), "command_path", "linearize")
    what, _, guess = (
        error.format_message()
        .replace("(Possible options: ", "Did you mean ")
        .replace("Value error, ", "")
        .partition("Did you mean")
    )
    what, guess = what.strip().rstrip("."), guess.strip().rstrip("?)")
    return 2, what[:1].lower() + what[1:], f"did you mean {guess}?" if guess else f"see: {path} --help"


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


def raised_by_a_plan(error: BaseException) -> bool:
    """Whether reading a checkpoint's mixer specs, which may raise only built-in exceptions, raised this one."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).parts[-2:] in (("modeling", "spec.py"), ("modeling", "plans.py"))


def internal(error: BaseException, debug: bool) -> int:
    """A bug: keep the traceback in a log."""
    who = "" if rank() == 0 else f" (rank {rank()})"
    log = write_log(error)
    rerun = "" if debug else "rerun with --debug for the traceback"
    kept = f"it is in {log}; please report it" if log else "please report it"
    tell(f"internal error{who}: {type(error).__name__}: {first_line(error)}", "; ".join(x for x in (rerun, kept) if x))
    return 1


def write_log(error: BaseException) -> Path | None:
    path = state_folder() / "error.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="replace")
    except OSError:
        return None
    return path
