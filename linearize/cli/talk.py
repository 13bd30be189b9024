"""The chat's loop: lines in, commands, answers out."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from difflib import get_close_matches
from types import FrameType
from typing import TYPE_CHECKING, Any

from linearize.cli import show
from linearize.cli.console import Console
from linearize.cli.exits import Terminated, report, state_folder
from linearize.cli.generate import clean
from linearize.errors import LinearizeError

if TYPE_CHECKING:
    from linearize.serving.session import Session, Settings

PROMPT, MORE, QUOTES = ">>> ", "... ", '"""'
COMMANDS = {
    "/help": "list the commands",
    "/reset": "forget the talk",
    "/undo": "take the last message and its answer back",
    "/system": "show the system prompt; /system TEXT sets it and starts anew",
    "/stats": "speed and memory of the last answer",
    "/quit": "leave (so does Ctrl-D)",
}
HISTORY_LENGTH = 1000


class Talk:
    """One chat. On a terminal it edits lines and shows stats; else every line is a message and only answers are printed."""

    def __init__(self, session: Session, settings: Settings, console: Console, interactive: bool) -> None:
        self.session, self.settings, self.console, self.interactive = session, settings, console, interactive

    def run(self) -> None:
        with line_editing() if self.interactive else nullcontext():
            if self.interactive:
                self.console.grey('/help lists the commands, """ starts and ends several lines')
            for text in messages(prompted() if self.interactive else iter(sys.stdin)):
                if not self.take(clean(text)):
                    return

    def take(self, text: str) -> bool:
        """Answer a message or obey a command; False ends the talk."""
        if text.startswith("/"):
            return self.obey(text)
        try:
            self.answer(text)
        except LinearizeError as error:
            if not self.interactive:
                raise
            report(error)  # the talk goes on
        return True

    def answer(self, text: str) -> None:
        with stoppable(self.session, self.interactive) as stopped:
            for piece in self.session.ask(text, self.settings):
                self.console.stream(piece)
        self.console.say()
        if self.interactive:
            self.console.grey(("stopped · " if stopped else "") + show.stats(self.session.last))

    def obey(self, text: str) -> bool:
        name, _, rest = text.strip().partition(" ")
        if name == "/quit":
            return False
        if name not in COMMANDS:
            close = get_close_matches(name, COMMANDS, n=1)
            self.console.note(f"unknown command {name}; " + (f"did you mean {close[0]}?" if close else "see /help"))
            return True
        for line in getattr(self, name.replace("/", "do_"))(rest.strip()):
            self.console.note(line)
        return True

    def do_help(self, _: str) -> list[str]:
        return [f"{name:<9}{meaning}" for name, meaning in COMMANDS.items()]

    def do_reset(self, _: str) -> list[str]:
        self.session.reset()
        return ["the talk is forgotten"]

    def do_undo(self, _: str) -> list[str]:
        before = len(self.session.history)
        self.session.undo()
        return ["the last message is taken back" if len(self.session.history) < before else "there is nothing to take back"]

    def do_system(self, text: str) -> list[str]:
        if not text:
            return [self.session.system or "no system prompt is set"]
        self.session.system = text
        self.session.reset()
        return ["the system prompt is set and the talk starts anew"]

    def do_stats(self, _: str) -> list[str]:
        turns = sum(1 for message in self.session.history if message["role"] == "assistant")
        return [f"answers: {turns}", show.stats(self.session.last) if self.session.last else "no answer yet"]


def messages(lines: Iterator[str]) -> Iterator[str]:
    """Lines joined between triple quotes; empty ones left out."""
    for line in lines:
        text = line.strip()
        if text.startswith(QUOTES):
            text = block(text.removeprefix(QUOTES), lines)
        if text.strip():
            yield text


def block(first: str, lines: Iterator[str]) -> str:
    found = first
    while not found.rstrip().endswith(QUOTES):
        line = next(lines, None)
        if line is None:
            return found
        found = f"{found}\n{line.rstrip()}"
    return found.rstrip().removesuffix(QUOTES).strip("\n")


def prompted() -> Iterator[str]:
    """Lines that the user types, until Ctrl-D; Ctrl-C only empties the line."""
    while True:
        try:
            yield input(PROMPT)
        except EOFError:
            print()
            return
        except Terminated:
            raise
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D leaves)")


@contextmanager
def stoppable(session: Session, interactive: bool) -> Iterator[list[bool]]:
    """The first Ctrl-C ends the answer, the second the program. The list is empty unless the answer was stopped."""
    stopped: list[bool] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(True)
        session.stop()

    before: Any = signal.signal(signal.SIGINT, stop) if interactive else None
    try:
        yield stopped
    finally:
        if interactive:
            signal.signal(signal.SIGINT, before)


@contextmanager
def line_editing() -> Iterator[None]:
    """History and completion of commands, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    path = state_folder() / "chat_history"
    with suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LENGTH)
    readline.set_completer_delims(" ")
    readline.set_completer(lambda text, state: ([c for c in COMMANDS if text and c.startswith(text)] + [None])[state])
    readline.parse_and_bind("tab: complete")
    try:
        yield
    finally:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
