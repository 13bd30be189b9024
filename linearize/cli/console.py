"""What the user sees: data on stdout, progress and notes on stderr. Alone in importing rich, and only once it draws."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from linearize.cli.exits import rank
from linearize.cli.units import clock, plain, words

if TYPE_CHECKING:
    import rich.progress
    from rich.console import Console as RichConsole

PIPED_WIDTH = 120  # of a table that no terminal bounds
GAP = 2  # spaces between columns
LONGEST_WORD = 20  # that a column of words leaves whole where a table is too wide
INTERVAL = 5.0  # seconds between two lines of progress in a log
CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@dataclass(frozen=True)
class Column:
    """A table's column; numbers stand right and never wrap, as their title may."""

    title: str
    number: bool = False


class Console:
    """Tables, lines and streams on stdout (nothing there but one object with `--json`), progress on stderr."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self.quiet = as_json or rank() != 0
        self._progress: Bars | Lines | None = None
        for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a letter shows '?', and nothing fails
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")

    def say(self, text: str = "") -> None:
        """One line on stdout, for people."""
        if not self.quiet:
            self.pause()
            print(text, flush=True)

    def note(self, text: str) -> None:
        """One line on stderr."""
        if rank() == 0:
            self.pause()
            print(text, file=sys.stderr, flush=True)

    def stream(self, piece: str) -> None:
        """A piece of a model's answer; on a terminal without control characters, which could reprogram it."""
        if not self.quiet:
            self.pause()
            print(piece.translate(CONTROL) if sys.stdout.isatty() else piece, end="", flush=True)

    def grey(self, text: str) -> None:
        """One pale line on stderr."""
        if rank() == 0:
            self.pause()
            self._draw(sys.stderr, text, style="bright_black")

    def data(self, value: object) -> None:
        """The object of `--json`."""
        if self.as_json and rank() == 0:
            self.pause()
            print(json.dumps(plain(value), indent=2, ensure_ascii=False), flush=True)

    def facts(self, rows: Sequence[tuple[str, str]]) -> None:
        """Name and value, a row each."""
        self.table((Column(""), Column("")), [row for row in rows if row[1]], header=False)

    def table(self, columns: Sequence[Column], rows: Sequence[Sequence[str]], header: bool = True) -> None:
        if self.quiet:
            return
        from rich.table import Table

        table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), show_header=header, header_style="bold")
        room = rich_console(sys.stdout).width - GAP * len(columns)
        for column, width in zip(columns, widths(columns, rows, header, room), strict=True):
            right = "right" if column.number else "left"
            table.add_column(column.title, justify=right, width=width, overflow="fold")  # type: ignore[arg-type]
        for row in rows:
            table.add_row(*row)
        self.pause()
        self._draw(sys.stdout, table)

    def _draw(self, stream: TextIO, thing: Any, style: str | None = None) -> None:
        console = rich_console(stream)
        with console.capture() as captured:
            console.print(thing, style=style)
        lines = captured.get().splitlines()
        print("\n".join(line.rstrip() for line in lines), file=stream, flush=True)

    @contextmanager
    def progress(self) -> Iterator[Bars | Lines]:
        """A progress callback that draws bars on a terminal and writes a line now and then elsewhere."""
        live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._progress = Bars() if live else Lines()
        try:
            yield self._progress
        finally:
            self.pause()
            self._progress = None

    def pause(self) -> None:
        """Take the bars off the screen before anything else is printed."""
        if isinstance(self._progress, Bars):
            self._progress.stop()


class Lines:
    """Progress as lines in a log."""

    def __init__(self) -> None:
        self.task, self.start, self.first, self.done, self.next = "", 0.0, 0.0, 0.0, 0.0

    def __call__(self, task: str, done: float, total: float, **facts: object) -> None:
        now = time.monotonic()
        if task != self.task or done < self.done:
            self.task, self.start, self.first, self.next = task, now, done, now
        self.done = done
        finished = done >= total and self.next != math.inf
        if rank() or (total <= 1 and done) or not (finished or now >= self.next):
            return
        self.next = now + INTERVAL if done < total else math.inf  # a finished task has nothing more to say
        share = f"{100 * done / total:3.0f}%" if total > 1 else ""
        text = [task, share, *([f"eta {clock(eta)}"] if (eta := self._eta(now, done, total)) is not None else []), words(facts)]
        print("  ".join(x for x in text if x), file=sys.stderr, flush=True)

    def _eta(self, now: float, done: float, total: float) -> float | None:
        if done <= self.first or done >= total:
            return None
        return (now - self.start) * (total - done) / (done - self.first)


class Bars:
    """Progress as a bar with the time left."""

    def __init__(self) -> None:
        self.bars: rich.progress.Progress | None = None
        self.ids: dict[str, rich.progress.TaskID] = {}

    def __call__(self, task: str, done: float, total: float, **facts: object) -> None:
        if rank():
            return
        if total <= 1:  # a step without a measure: one line, and room for the bars of whatever downloads or loads in it
            self.stop()
            if not done:
                print(f"{task}  {words(facts)}".rstrip(), file=sys.stderr, flush=True)
            return
        if self.bars is None:
            self._start()
        assert self.bars is not None
        if task not in self.ids:
            self.ids[task] = self.bars.add_task(task, total=total, completed=0, facts="")
        self.bars.update(self.ids[task], completed=done, total=total, facts=words(facts))

    def _start(self) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(20),
            TaskProgressColumn(),
            TextColumn("eta", style="progress.remaining"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[facts]}", style="bright_black", markup=False),
            console=rich_console(sys.stderr),
            refresh_per_second=4,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.bars.start()

    def stop(self) -> None:
        if self.bars is not None:
            self.bars.stop()
        self.bars, self.ids = None, {}


def widths(columns: Sequence[Column], rows: Sequence[Sequence[str]], header: bool, room: int) -> list[int | None]:
    """A table's columns, each as wide as it would be or, where that is more than `room`, the ones with most to spare narrower.

    Numbers stay whole, words up to LONGEST_WORD letters. None for all columns where not even that fits.
    """
    from rich.cells import cell_len  # letters of some scripts are two wide

    found, least = [], []
    for column, *cells in zip(columns, *rows, strict=True):
        title = column.title if header else ""
        words = max(map(cell_len, f"{title} {'' if column.number else ' '.join(cells)}".split()), default=0)
        numbers = max(map(cell_len, cells), default=0) if column.number else 0
        found.append(max(map(cell_len, (title, *cells))))
        least.append(max(min(words, LONGEST_WORD), numbers))
    if sum(least) > room:
        return [None] * len(columns)
    while sum(found) > room:
        spare = [own - less for own, less in zip(found, least, strict=True)]
        found[spare.index(max(spare))] -= 1
    return list(found)


def rich_console(stream: TextIO) -> RichConsole:
    from rich.console import Console as Rich

    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH
    return Rich(file=stream, width=width, highlight=False, markup=False, emoji=False, legacy_windows=False)
