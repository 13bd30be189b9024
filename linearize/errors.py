"""The only exceptions that a user sees: what went wrong, where, and what to do; each kind has its exit code."""

from __future__ import annotations


class LinearizeError(Exception):
    """`what` and `where` make the first line, `fix` the second."""

    code = 1

    def __init__(self, what: str, where: str = "", fix: str = "") -> None:
        super().__init__(f"{what}: {where}" if where else what)
        self.what, self.where, self.fix = what, where, fix


class UsageError(LinearizeError):
    """A flag or an argument that cannot be used."""

    code = 2


class InputError(LinearizeError):
    """A recipe or data that is not valid."""

    code = 3


class UnsupportedError(LinearizeError):
    """A model that cannot be converted."""

    code = 4


class ResourceError(LinearizeError):
    """Disk, memory or a lock."""

    code = 5


class TrainingError(LinearizeError):
    """Training failed numerically."""

    code = 6


class HubError(LinearizeError):
    """The network or the hub."""

    code = 7


class IntegrityError(LinearizeError):
    """A file that is corrupt, tampered with or unsafe to load."""

    code = 8


class Interrupted(LinearizeError):
    """Training stopped by a signal, its state saved: exit code 128 + the signal's number."""

    def __init__(self, number: int, where: str) -> None:
        super().__init__("stopped, state saved", where, "the same command with --resume auto goes on")
        self.code = 128 + number
