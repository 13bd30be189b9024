"""Forms of recall: what is hidden in a text, what is asked at its end, which of the words there are the answer.

The same forms make rows to learn from (`recall_rows`) and prompts to measure with (`recall`), by words and numbers that the two
do not share. Needle forms S-NIAH 1-3, multi-key and variable tracking follow RULER (arXiv:2404.06654), MQAR Zoology (2312.04927),
chains of facts bAbI's second task as BABILong asks it (2406.10149). A form is one function, registered by `form`.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Tokens = list[int]
ESSAY, FILLER = "essay", "filler"


@dataclass(frozen=True)
class Words:
    """What a form may draw from."""

    digits: tuple[int, ...]
    names: tuple[str, ...]
    cities: tuple[str, ...]


LEARNT = Words(
    (4, 6, 7),
    ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "haven", "indigo", "juniper", "kestrel", "lagoon"),
    ("Lisbon", "Oslo", "Quito", "Hanoi", "Accra", "Perth", "Turin", "Minsk", "Cusco", "Izmir", "Bergen", "Nantes"),
)
ASKED = Words(
    (5,),
    ("anchor", "basket", "candle", "dragon", "engine", "falcon", "garden", "hammer", "island", "jacket", "kitten", "ladder"),
    ("Paris", "Cairo", "Delhi", "Tokyo", "Milan", "Lagos", "Dublin", "Prague", "Vienna", "Boston", "Athens", "Madrid"),
)
PEOPLE = ("Mary", "John", "Daniel", "Sandra")
PLACES = ("kitchen", "garden", "office", "bedroom", "hallway", "bathroom")
THINGS = ("apple", "football", "milk", "letter")
PAIRS, QUERIES, LIST, HOPS, DISTRACTORS = 4, 4, 12, 4, 3


class Writer:
    """Draws and encodes the pieces of one text."""

    def __init__(self, tokenizer: Any, seed: str, words: Words = LEARNT) -> None:
        self.tokenizer, self.draw, self.words = tokenizer, random.Random(seed), words

    def encode(self, text: str) -> Tokens:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def digits(self) -> str:
        return "".join(self.draw.choice("0123456789") for _ in range(self.draw.choice(self.words.digits)))

    def pairs(self, count: int) -> list[tuple[str, str]]:
        return [(name, self.digits()) for name in self.draw.sample(self.words.names, count)]


@dataclass(frozen=True)
class Asked:
    """`hidden` pieces in the order in which they must come, and the end: words given and words to be told (True), in turn.

    `around` is the text between: an essay, or filler that repeats itself.
    """

    hidden: list[str]
    end: list[tuple[str, bool]]
    around: str = ESSAY

    @property
    def question(self) -> str:
        return "".join(words for words, _ in self.end)

    @property
    def answer(self) -> str:
        return "".join(words for words, told in self.end if told)


Form = Callable[[Writer], Asked]
FORMS: dict[str, Form] = {}


def form(name: str) -> Callable[[Form], Form]:
    """Register a form under its name."""

    def register(function: Form) -> Form:
        FORMS[name] = function
        return function

    return register


@form("pass-key")
def pass_key(w: Writer) -> Asked:
    """One number, said once, in filler."""
    key = w.digits()
    said = f" The pass key is {key}. Remember it. {key} is the pass key. "
    return Asked([said], [("\nWhat is the pass key? The pass key is", False), (f" {key}", True), (".", False)], FILLER)


def _magic(w: Writer, values: list[tuple[str, str]], kind: str, around: str) -> Asked:
    """RULER's needles: one of them is asked for."""
    name, value = w.draw.choice(values)
    hidden = [f" One of the special magic {kind}s for {n} is: {v}. " for n, v in values]
    ask = f"\nWhat is the special magic {kind} for {name} mentioned in the provided text?"
    told = f" The special magic {kind} for {name} mentioned in the provided text is"
    return Asked(hidden, [(ask + told, False), (f" {value}", True), (".", False)], around)


@form("s-niah-1")
def single_1(w: Writer) -> Asked:
    """A number under a word, in filler."""
    return _magic(w, w.pairs(1), "number", FILLER)


@form("s-niah-2")
def single_2(w: Writer) -> Asked:
    """A number under a word, in essays."""
    return _magic(w, w.pairs(1), "number", ESSAY)


@form("s-niah-3")
def single_3(w: Writer) -> Asked:
    """A long identifier under a word, in essays."""
    identifier = str(uuid.UUID(int=w.draw.getrandbits(128), version=4))
    return _magic(w, [(w.draw.choice(w.words.names), identifier)], "uuid", ESSAY)


@form("multi-key")
def multi_key(w: Writer) -> Asked:
    """Several words with a number each, apart from each other; one is asked for."""
    return _magic(w, w.pairs(PAIRS), "number", ESSAY)


@form("key-value")
def key_value(w: Writer) -> Asked:
    """The same in few words: for rows to learn from."""
    pairs = w.pairs(PAIRS)
    name, key = w.draw.choice(pairs)
    end = [(f"\nWhat is the code of {name}? The code of {name} is", False), (f" {key}", True), (".", False)]
    return Asked([f" The code of {n} is {k}. " for n, k in pairs], end)


@form("variable-tracking")
def variables(w: Writer) -> Asked:
    """A value handed from name to name, each assignment a piece of its own; the names that hold it are asked for."""
    value = w.digits()
    names = [name.upper() for name in w.draw.sample(w.words.names, HOPS)]
    hidden = [f" VAR {names[0]} = {value}. "] + [f" VAR {b} = VAR {a}. " for a, b in pairwise(names)]
    ask = f"\nWhich variables are assigned the value {value}? The variables assigned the value {value} are"
    return Asked(hidden, [(ask, False), (" " + ", ".join(names), True), (".", False)], FILLER)


@form("mqar")
def associative(w: Writer) -> Asked:
    """Many pairs in one place, and the value of each of several asked for again."""
    pairs = w.pairs(2 * QUERIES)
    asked = w.draw.sample(pairs, QUERIES)
    end: list[tuple[str, bool]] = [("\nAgain:", False)]
    for name, value in asked:
        end += [(f" {name} =", False), (f" {value}", True), (";", False)]
    return Asked([" Pairs:" + "".join(f" {n} = {v};" for n, v in pairs) + " "], end)


@form("chain")
def chain(w: Writer) -> Asked:
    """Facts that must be put together: who took a thing, and where that person went then; other people move about too."""
    carrier, *others = w.draw.sample(PEOPLE, len(PEOPLE))
    thing, (before, after, *rest) = w.draw.choice(THINGS), w.draw.sample(PLACES, len(PLACES))
    facts = [f" {carrier} went to the {before}. {carrier} took the {thing}. ", f" {carrier} moved to the {after}. "]
    others = [f" {who} went to the {where}. " for who, where in zip(others, rest[:DISTRACTORS], strict=False)]
    place = w.draw.randint(0, len(others))
    facts = others[:place] + facts + others[place:]
    end = [(f"\nWhere is the {thing}? The {thing} is in the", False), (f" {after}", True), (".", False)]
    return Asked(facts, end)


@form("copying")
def copying(w: Writer) -> Asked:
    """A list of words, said again."""
    said = " ".join(w.draw.choices(w.words.names + w.words.cities, k=LIST))
    return Asked([f" The list: {said}. "], [("\nThe list again:", False), (f" {said}", True), (".", False)])


@form("fact")
def fact(w: Writer) -> Asked:
    """A made-up fact."""
    city, name = w.draw.choice(w.words.cities), w.draw.choice(w.words.names).title()
    hidden = f" In {city}, the oldest café is called {name}. "
    return Asked([hidden], [(f"\nThe oldest café in {city} is called", False), (f" {name}", True), (".", False)])
