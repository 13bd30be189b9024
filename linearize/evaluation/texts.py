"""The text that an evaluation reads: whole documents, some of them as long as it looks, each row from inside one of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from linearize import text
from linearize.errors import InputError
from linearize.text import Packed

SHORT = 1024
BUCKETS = (0, 1024, 2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True)
class Texts:
    """Rows (1, T), and for each the number of the document that it is from."""

    rows: list[Packed]
    documents: list[int]

    @classmethod
    def of(cls, packed: Packed) -> Texts:
        """Each row a document of its own."""
        rows = [Packed(packed.ids[i : i + 1], packed.positions[i : i + 1]) for i in range(len(packed))]
        return cls(rows, list(range(len(rows))))

    @property
    def longest(self) -> int:
        return max(row.ids.shape[1] for row in self.rows)

    def hash(self) -> str:
        """A name for these tokens."""
        found = hashlib.sha256()
        for row in self.rows:
            found.update(str(row.ids.tolist()).encode())
        return found.hexdigest()[:16]

    def buckets(self) -> list[tuple[int, int]]:
        """Ranges of positions that these rows reach: 0 to 1,024, to 2,048, to 4,096, ..."""
        return [(a, b) for a, b in pairwise(BUCKETS) if a + SHORT // 4 < self.longest]


def read_texts(tokenizer: Any, docs: Sequence[str], tokens: int, length: int) -> Texts:
    """About `tokens` tokens in rows of at most `length`, each from one document's start or going on in it.

    Half of them go to the longest documents, read as far as `length`; the other half to pieces of up to 1,024 tokens of the
    others, so that the first positions are not those of two or three documents. InputError where there is nothing to predict.
    """
    encoded = text.tokenise(tokenizer, docs)
    if max(map(len, encoded), default=0) < 2:
        raise InputError("the text has fewer than two tokens", "--data", "pass more text")
    order = sorted(range(len(encoded)), key=lambda i: -min(len(encoded[i]), length))
    long = _taken(((i, encoded[i][:length]) for i in order), max(tokens // 2, min(tokens, SHORT)))
    used = {i for i, _ in long}
    rest = _taken(_pieces(encoded, [i for i in reversed(order) if i not in used] or order), tokens - sum(len(x) for _, x in long))
    rows = [(i, ids) for i, ids in (*long, *rest) if len(ids) > 1]
    return Texts([_row(ids) for _, ids in rows], [i for i, _ in rows])


def _pieces(encoded: Sequence[list[int]], order: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """The first piece of every document, then the second of each that has one, and so on."""
    for start in range(0, max(len(encoded[i]) for i in order), SHORT):
        for i in order:
            if start < len(encoded[i]):
                yield i, encoded[i][start : start + SHORT]


def _taken(pieces: Iterator[tuple[int, list[int]]], budget: int) -> list[tuple[int, list[int]]]:
    found, left = [], budget
    for i, ids in pieces:
        if left < 2:
            break
        found.append((i, ids[:left]))
        left -= len(found[-1][1])
    return found


def _row(ids: list[int]) -> Packed:
    return Packed(torch.tensor([ids]), torch.arange(len(ids))[None])
