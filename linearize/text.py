"""Documents in, rows of tokens out: split by hash, packed with their boundaries kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from linearize.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

HELD_OUT_PERCENT = 10


def fingerprint(document: str) -> int:
    """A number that depends on the document alone: which side of a split it falls on never changes."""
    return int.from_bytes(hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def split(docs: Sequence[str], percent: int = HELD_OUT_PERCENT) -> tuple[list[str], list[str]]:
    """Training and held-out documents, by hash: at least one on each side of two or more, a single one for training.

    Copies of a document are on one side; held out it stands once, or it would count twice and intervals would be too narrow.
    """
    once = dict.fromkeys(docs)
    order = sorted(once, key=fingerprint)
    held = {d for d in order if fingerprint(d) % 100 < percent}
    if len(order) > 1 and not held:
        held = {order[0]}
    if len(held) == len(order):
        held -= set(order[-1:])
    return [d for d in docs if d not in held], [d for d in once if d in held]


@dataclass(frozen=True)
class Packed:
    """Token ids (N, T) and positions (N, T) that start again at each document; targets across a boundary do not count.

    `mask_token` stands for hidden tokens, where an encoder is to guess them.
    """

    ids: Tensor
    positions: Tensor
    mask_token: int | None = None

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    def first(self, tokens: int) -> Packed:
        """The first tokens of each row alone."""
        return replace(self, ids=self.ids[:, :tokens], positions=self.positions[:, :tokens])


def tokenise(tokenizer: Any, docs: Iterable[str], limit: int | None = None) -> list[list[int]]:
    """Token ids of each document, ended by the tokenizer's end; stops after `limit` tokens."""
    found, total = [], 0
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    for doc in docs:
        ids = tokenizer(doc, add_special_tokens=False, verbose=False)["input_ids"] + end
        found.append(ids)
        total += len(ids)
        if limit is not None and total >= limit:
            break
    return found


def pack(documents: Sequence[Sequence[int]], length: int) -> Packed:
    """Rows of exactly `length` tokens; a document goes on in the next row, from position 0. An unfilled last row is left out."""
    import torch

    ids: list[int] = []
    positions: list[int] = []
    for doc in documents:
        start = 0
        while start < len(doc):
            take = min(length - len(ids) % length, len(doc) - start)
            ids.extend(doc[start : start + take])
            positions.extend(range(take))
            start += take
    rows = len(ids) // length
    if not rows:
        raise InputError(
            f"the text has {len(ids)} tokens, fewer than one row of {length}", "--sequence", "more text, or a shorter --sequence"
        )

    def shape(values: list[int]) -> Tensor:
        return torch.tensor(values[: rows * length], dtype=torch.long).view(rows, length)

    return Packed(shape(ids), shape(positions))


def whole(documents: Sequence[Sequence[int]], length: int) -> Packed:
    """Rows that each lie inside one document: for figures at long positions, where a boundary would start the text again."""
    inside = [doc[i : i + length] for doc in documents for i in range(0, len(doc) - length + 1, length)]
    return pack(inside or documents, length)


def framed(tokenizer: Any, documents: Sequence[Sequence[int]], length: int) -> Packed:
    """Rows as an encoder reads them: each a piece of one document between the tokenizer's first and last special tokens."""
    first, last = ([x] if x is not None else [] for x in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    room = max(length - len(first) - len(last), 1)
    pieces = [[*first, *doc[i : i + room], *last] for doc in documents for i in range(0, len(doc), room)]
    return replace(whole(pieces, length), mask_token=tokenizer.mask_token_id)
