"""Synthetic recall to learn from: rows in which something said early is asked for at the end. Seeded, for any tokenizer.

What is hidden never occurs in the evaluation's prompts: numbers there have five digits, here others, and words are others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from linearize.errors import InputError
from linearize.evaluation.recall_forms import FORMS, LEARNT, Tokens, Writer
from linearize.text import Packed

TASKS = ("pass-key", "key-value", "fact", "copying")  # where few are taken, these are the first
KEY_DIGITS = LEARNT.digits


def recall_row(task: str, tokenizer: Any, documents: Sequence[Tokens], length: int, seed: str, within: float = 1.0) -> Tokens:
    """Exactly `length` tokens: pieces of a task at drawn places in drawn text, and the question with its answer at the end.

    The places lie in the first `within` of the text, a share of it.
    """
    w = Writer(tokenizer, f"{task}-{seed}")
    asked = FORMS[task](w)
    hidden, end = [w.encode(piece) for piece in asked.hidden], w.encode(asked.question)
    room = length - sum(map(len, hidden)) - len(end)
    if room < 0:
        raise InputError(f"a row of recall task '{task}' needs {length - room} tokens, got {length}", "--sequence", "a longer one")
    around: Tokens = []
    while len(around) < room:
        doc = w.draw.choice(documents)
        start = w.draw.randrange(len(doc))
        around += doc[start : start + room - len(around)]
    return hide(around, hidden, sorted(w.draw.randint(0, int(room * within)) for _ in hidden)) + end


def hide(around: Tokens, hidden: Sequence[Tokens], places: Sequence[int]) -> Tokens:
    """The pieces put into the text before the tokens at `places`, which rise."""
    found, before = Tokens(), 0
    for place, piece in zip(places, hidden, strict=True):
        found += around[before:place] + piece
        before = place
    return found + around[before:]


def mixed(rows: Packed, share: float, tokenizer: Any, documents: Sequence[Tokens], seed: int) -> Packed:
    """The rows (N, T), and so many of recall after them that these are `share` of all; tasks in turn, each row its own text."""
    import torch

    if not 0 <= share < 1:
        raise InputError(f"the share of recall must be at least 0 and below 1, got {share}", "--recall", "--recall 0.05")
    count, length = round(len(rows) * share / (1 - share)), rows.ids.shape[1]
    filled = [doc for doc in documents if doc]
    made = [recall_row(TASKS[i % len(TASKS)], tokenizer, filled, length, f"{seed}-{i}") for i in range(count)]
    if not made:
        return rows
    positions = torch.arange(length).expand(count, -1)
    return replace(rows, ids=torch.cat([rows.ids, torch.tensor(made)]), positions=torch.cat([rows.positions, positions]))
