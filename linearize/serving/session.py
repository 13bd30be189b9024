"""A talk with a checkpoint: the state is carried from turn to turn, and rolled back by copies of its constant size."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize.progress import Progress, silent
from linearize.serving.generate import Generator, Run, Settings, open_generator

SNAPSHOTS = 4  # states to go back to; a talk that goes back further is read again
Messages = Sequence[dict[str, str]]


@dataclass
class Heard:
    """What a cache has read: the first `length` letters of the talk as its template writes it, whose hash is `digest`.

    `pending` are the last tokens of them, which the cache is still to read; `turns` messages stand in them. The text is not kept in
    each, nor its tokens: a talk's memory would grow with them.
    """

    cache: Any
    turns: int = 0
    length: int = 0
    digest: int = hash("")
    pending: list[int] = field(default_factory=list)

    def begins(self, text: str) -> bool:
        """Whether the talk is still what was read, and goes on."""
        return hash(text[: self.length]) == self.digest

    def note(self, text: str, pending: list[int]) -> None:
        self.length, self.digest, self.pending = len(text), hash(text), pending


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
        self._heard = Heard(self.generator.new_cache())
        self._tokens = torch.empty(0, dtype=torch.long)  # all that the state has read; older states have read its beginnings
        self._snapshots: list[Heard] = []

    def undo(self) -> None:
        """Take the last question and its answer back; the state is as it was before them."""
        del self.history[-2:]
        while self._snapshots:
            last = self._snapshots.pop()
            if last.turns == len(self.history):
                self._heard = last
                return
        self._heard = Heard(self.generator.new_cache())

    def ask(self, text: str, settings: Settings) -> Iterator[str]:
        """Pieces of the answer. Special tokens in the user's text are text, not commands."""
        before = list(self.history)
        self.history.append({"role": "user", "content": self._plain(text)})
        talk = self._render(self.history)
        if not self._heard.begins(talk):
            self._go_back(talk, before)
        self._heard.turns = len(before)
        self._snapshots = [*self._snapshots, copy.deepcopy(self._heard)][-SNAPSHOTS:]
        ids, pieces, whole = self._unread(talk), list[str](), False
        try:
            for piece in self.generator.stream(ids, self._heard.cache, settings):
                pieces.append(piece)
                yield piece
            whole = True
        finally:
            answer = "".join(pieces)
            self.history.append({"role": "assistant", "content": answer})
            if whole:
                self._tokens = self.generator.sequence
                special = set(self.generator.tokenizer.all_special_ids)  # the template writes what ends an answer
                rest = self._tokens[self._heard.cache.get_seq_length() :].tolist()
                self._heard.note(talk + answer, [token for token in rest if token not in special])
            else:  # nobody knows how far the cache has come
                self._heard = copy.deepcopy(self._snapshots[-1])

    def _go_back(self, talk: str, before: Messages) -> None:
        """The newest state that has read a beginning of the talk, brought to the end of what was said before this question.

        A template may write the past in another way than it was said, an answer without the spaces at its ends for one. Mostly one
        turn is read again, so that what a turn costs does not grow with the talk.
        """
        while self._snapshots and not self._snapshots[-1].begins(talk):
            self._snapshots.pop()
        self._heard = copy.deepcopy(self._snapshots[-1]) if self._snapshots else Heard(self.generator.new_cache())
        said = self._render(before, question=False) if before else ""
        if len(said) > self._heard.length and talk.startswith(said):
            ids = self._unread(said)
            self.generator.read(ids, self._heard.cache)
            self._heard.note(said, [])

    def _unread(self, talk: str) -> Tensor:
        """Tokens (T,) of the talk, which begins with what was heard: those that the cache has read, then those that it has not."""
        tokenizer, heard = self.generator.tokenizer, self._heard
        first = heard.length == 0 and tokenizer.chat_template is None  # elsewhere the template has written the special tokens
        new = tokenizer(talk[heard.length :], add_special_tokens=first)["input_ids"]
        unread = torch.tensor([*heard.pending, *new], dtype=torch.long)
        self._tokens = torch.cat([self._tokens[: heard.cache.get_seq_length()], unread])  # in place of the last: a talk is long
        return self._tokens

    def _plain(self, text: str) -> str:
        for token in self.generator.tokenizer.all_special_tokens:
            text = text.replace(token, f"{token[0]}\u200b{token[1:]}")
        return text

    def _render(self, messages: Messages, question: bool = True) -> str:
        """The talk as text, with what an answer begins with where it ends on a question."""
        tokenizer = self.generator.tokenizer
        system = [{"role": "system", "content": self.system}] if self.system else []
        if tokenizer.chat_template is None:
            spaces = {"assistant": ""}  # an answer has its own
            turns = [f"{m['role'].capitalize()}:{spaces.get(m['role'], ' ')}{m['content']}\n" for m in [*system, *messages]]
            return "".join(turns) + ("Assistant:" if question else "")
        text: str = tokenizer.apply_chat_template([*system, *messages], add_generation_prompt=question, tokenize=False)
        return text


__all__ = ["Run", "Session", "Settings"]
