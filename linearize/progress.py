"""How the library reports long work: it calls back, and never prints."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called as work goes on: `task` names it, `done` of `total` says how far, `facts` are figures to show (loss=0.12)."""

    def __call__(self, task: str, done: float, total: float, **facts: object) -> None: ...


def silent(task: str, done: float, total: float, **facts: object) -> None:
    """Report nothing."""
