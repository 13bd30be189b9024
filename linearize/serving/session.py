"""A talk with a checkpoint: the state is carried from turn to turn, and rolled back by copies of its constant size."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from linearize.progress import Progress, silent
from linearize.serving.generate import Generator, Run, Settings, open_generator

SNAPSHOTS = 8


class Session:
    """History, and the cache that has consumed it. `ask` streams an answer; `stop` ends it and the talk goes on."""

    def __init__(self, directory: Path, *, system: str | None = None, run: Run | None = None, report: Progress = silent) -> None:
        self._begin(open_generator(directory, run, report), system)

    @classmethod
    def of(cls, model: Any, tokenizer: Any, system: str | None = None) -> Session:
        """A talk with a model in memory."""
        session = cls.__new__(cls)
        session._begin(Generator(model, tokenizer), system)
        return session

    def _begin(self, generator: Generator, system: str | None) -> None:
        self.generator, self.system = generator, system
        self.reset()

    @property
    def last(self) -> dict[str, Any]:
        return self.generator.last

    def stop(self) -> None:
        self.generator.stop()

    def reset(self) -> None:
        """Forget the talk."""
        self.history: list[dict[str, str]] = []
        self._consumed: list[int] = []
        self._cache = self.generator.new_cache()
        self._snapshots: list[tuple[int, list[int], Any]] = []

    def undo(self) -> None:
        """Take the last question and its answer back; the state is as it was before them."""
        del self.history[-2:]
        while self._snapshots:
            turns, consumed, cache = self._snapshots.pop()
            if turns == len(self.history):
                self._consumed, self._cache = consumed, cache
                return
        self._consumed, self._cache = [], self.generator.new_cache()

    def ask(self, text: str, settings: Settings) -> Iterator[str]:
        """Pieces of the answer. Special tokens in the user's text are text, not commands."""
        self._snapshots = [*self._snapshots, (len(self.history), list(self._consumed), copy.deepcopy(self._cache))][-SNAPSHOTS:]
        self.history.append({"role": "user", "content": self._plain(text)})
        ids = self._render()
        if ids[: len(self._consumed)] != self._consumed or len(ids) <= len(self._consumed):
            self._consumed, self._cache = [], self.generator.new_cache()  # the template re-wrote the past: read it again
        pieces = []
        try:
            for piece in self.generator.stream(ids, self._cache, settings):
                pieces.append(piece)
                yield piece
        finally:
            self.generator.stop()
            self.history.append({"role": "assistant", "content": "".join(pieces)})
            self._consumed = ids[: self._cache.get_seq_length()]

    def _plain(self, text: str) -> str:
        for token in self.generator.tokenizer.all_special_tokens:
            text = text.replace(token, f"{token[0]}\u200b{token[1:]}")
        return text

    def _render(self) -> list[int]:
        tokenizer = self.generator.tokenizer
        system = [{"role": "system", "content": self.system}] if self.system else []
        if tokenizer.chat_template is None:
            turns = [f"{m['role'].capitalize()}: {m['content']}\n" for m in [*system, *self.history]]
            return list(tokenizer("".join(turns) + "Assistant:")["input_ids"])
        rendered = tokenizer.apply_chat_template(
            [*system, *self.history], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return list(rendered["input_ids"])


__all__ = ["Run", "Session", "Settings"]
