"""Synthetic recall to learn from: rows in which something said early is asked for at the end. Seeded, for any tokenizer.

What is hidden never occurs in the evaluation's prompts: keys there have five digits, here other numbers of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from linearize.errors import InputError
from linearize.text import Packed

Tokens = list[int]
KEY_DIGITS = (4, 6, 7)
NAMES = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "haven", "indigo", "juniper", "kestrel", "lagoon")
CITIES = ("Lisbon", "Oslo", "Quito", "Hanoi", "Accra", "Perth", "Turin", "Minsk", "Cusco", "Izmir", "Bergen", "Nantes")
PAIRS, WORDS = 4, 12


class Writer:
    """Draws and encodes the pieces of one row."""

    def __init__(self, tokenizer: Any, seed: str) -> None:
        self.tokenizer, self.draw = tokenizer, random.Random(seed)

    def encode(self, text: str) -> Tokens:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def digits(self) -> str:
        return "".join(self.draw.choice("0123456789") for _ in range(self.draw.choice(KEY_DIGITS)))


Task = Callable[[Writer], tuple[list[str], str]]


def pass_key(w: Writer) -> tuple[list[str], str]:
    """One number, said once."""
    key = w.digits()
    return [f" The secret number is {key}. Keep it in mind. "], f"\nWhich secret number was mentioned? It was {key}."


def key_value(w: Writer) -> tuple[list[str], str]:
    """Several names with a number each, apart from each other; one is asked for."""
    pairs = [(name, w.digits()) for name in w.draw.sample(NAMES, PAIRS)]
    name, key = w.draw.choice(pairs)
    return [f" The code of {n} is {k}. " for n, k in pairs], f"\nWhat is the code of {name}? The code of {name} is {key}."


def needle(w: Writer) -> tuple[list[str], str]:
    """A made-up fact."""
    city, name = w.draw.choice(CITIES), w.draw.choice(NAMES)
    return [f" In {city}, the oldest café is called {name.title()}. "], f"\nThe oldest café in {city} is called {name.title()}."


def copying(w: Writer) -> tuple[list[str], str]:
    """A list of words, said again."""
    said = " ".join(w.draw.choices(NAMES + CITIES, k=WORDS))
    return [f" The list: {said}. "], f"\nThe list again: {said}."


TASKS: dict[str, Task] = {"pass-key": pass_key, "key-value": key_value, "needle": needle, "copying": copying}


def recall_row(task: str, tokenizer: Any, documents: Sequence[Tokens], length: int, seed: str) -> Tokens:
    """Exactly `length` tokens: pieces of a task at drawn places in drawn text, and the question with its answer at the end."""
    w = Writer(tokenizer, f"{task}-{seed}")
    pieces, question = TASKS[task](w)
    hidden, end = [w.encode(piece) for piece in pieces], w.encode(question)
    room = length - sum(map(len, hidden)) - len(end)
    if room < 0:
        raise InputError(f"a row of recall task '{task}' needs {length - room} tokens, got {length}", "--sequence", "a longer one")
    around: Tokens = []
    while len(around) < room:
        doc = w.draw.choice(documents)
        start = w.draw.randrange(len(doc))
        around += doc[start : start + room - len(around)]
    found, before = Tokens(), 0
    for place, piece in zip(sorted(w.draw.randint(0, room) for _ in hidden), hidden, strict=True):
        found += around[before:place] + piece
        before = place
    return found + around[before:] + end


def mixed(rows: Packed, share: float, tokenizer: Any, documents: Sequence[Tokens], seed: int) -> Packed:
    """The rows (N, T), and so many of recall after them that these are `share` of all; tasks in turn, each row its own text."""
    import torch

    if not 0 <= share < 1:
        raise InputError(f"the share of recall must be at least 0 and below 1, got {share}", "--recall", "--recall 0.05")
    count, length = round(len(rows) * share / (1 - share)), rows.ids.shape[1]
    filled = [doc for doc in documents if doc]
    made = [recall_row(list(TASKS)[i % len(TASKS)], tokenizer, filled, length, f"{seed}-{i}") for i in range(count)]
    if not made:
        return rows
    positions = torch.arange(length).expand(count, -1)
    return replace(rows, ids=torch.cat([rows.ids, torch.tensor(made)]), positions=torch.cat([rows.positions, positions]))
