"""Recall by length and depth: something hidden at least three windows before it is asked for. Seeded, nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from linearize.errors import UsageError
from linearize.evaluation.intervals import wilson
from linearize.evaluation.reading import Reader, Variant
from linearize.evaluation.recall_forms import ASKED, FILLER, FORMS, Tokens, Writer
from linearize.evaluation.recall_rows import hide

FILLERS = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. ",
    "The road winds down to the river. A boat waits at the pier. Nobody is on board yet. ",
    "Morning came slowly over the hills. The baker lit his oven. The street smelled of bread. ",
)
HEAD = "There is something hidden inside a lot of text. Find it and remember it.\n"
Report = Callable[[int, int], None]
TOKENS_AT_ONCE = 8192  # of prompts that are read together: more leave a processor's caches
WINDOWS = 3  # how far away what is hidden must be, in windows of the student
TASKS = ("pass-key", "s-niah-1", "s-niah-2", "s-niah-3", "multi-key", "variable-tracking", "mqar", "chain", "copying")


@dataclass(frozen=True)
class Prompt:
    """A text of exactly so many tokens, which of its last ones are to be told, and where what is asked for ends.

    To be told are an answer's tokens that hold a letter or digit. The others are given: a space or comma is no recall, and a model
    that goes on with another word than the space before a number has not shown that it forgot the number.
    """

    ids: Tokens
    told: list[bool]
    end_of_hidden: int


@dataclass(frozen=True)
class Grid:
    """What is asked: tasks, lengths in tokens, depths of the last hidden piece (0 the start, 1 three windows before the end)."""

    tasks: tuple[str, ...] = TASKS
    lengths: tuple[int, ...] = (512, 1024)
    depths: tuple[float, ...] = (0.25, 0.75)
    samples: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in FORMS:
                raise UsageError(f"there is no recall task '{task}'", "--recall-tasks", f"one of {', '.join(FORMS)}")


def prompt(task: str, tokenizer: Any, essay: Sequence[int], length: int, depth: float, distance: int, seed: str) -> Prompt | None:
    """One prompt of `length` tokens whose last hidden piece ends at least `distance` tokens before the question; None: no room.

    A piece's place is drawn before that of the last, so chains and several keys are spread over what comes before it.
    """
    w = Writer(tokenizer, f"{task}-{length}-{depth}-{seed}", ASKED)
    asked = FORMS[task](w)
    head, hidden = w.encode(HEAD), [w.encode(piece) for piece in asked.hidden]
    end, told = Tokens(), list[bool]()
    for words, answer in asked.end:
        new = w.encode(words)
        end, told = end + new, told + [answer and any(map(str.isalnum, tokenizer.decode([token]))) for token in new]
    while told and not told[-1]:
        end, told = end[:-1], told[:-1]
    room = length - len(head) - sum(map(len, hidden)) - len(end)
    deepest = room - distance
    if deepest < 0:
        return None
    around: Tokens = []
    start = w.draw.randrange(len(essay)) if essay else 0
    while len(around) < room:
        if asked.around == FILLER or not essay:
            around += w.encode(w.draw.choice(FILLERS))
        else:
            around, start = around + list(essay[start : start + room]), 0
    last = int(deepest * depth)
    places = sorted([last, *(w.draw.randint(0, last) for _ in hidden[1:])])
    text = head + hide(around[:room], hidden, places)
    after = room - last
    return Prompt(text + end, told, len(text) - after)


def scores_of(variant: Variant, prompts: Sequence[Prompt]) -> list[float]:
    """The share of each answer that the variant says, in its place, when it writes the likeliest token after the other.

    Prompts are as long as each other, and read side by side.
    """
    ids = torch.tensor([one.ids for one in prompts])
    count = max(len(one.told) - one.told.index(True) for one in prompts)
    told = torch.tensor([last(p.told, count) for p in prompts])
    right = (Reader(variant).filled(ids, told) == ids[:, -count:]) & told
    return (right.sum(1) / told.sum(1)).tolist()


def last(mask: Sequence[bool], count: int) -> list[bool]:
    """The mask of the last `count` tokens of a text, given that of fewer or more of them."""
    return ([False] * count + list(mask))[-count:]


def essay_of(tokenizer: Any, docs: Sequence[str]) -> Tokens:
    """The text that needles lie in."""
    return [token for doc in docs[:64] for token in tokenizer(doc, add_special_tokens=False, verbose=False)["input_ids"]][:100_000]


def prompts(task: str, tokenizer: Any, essay: Sequence[int], length: int, grid: Grid, window: int) -> list[tuple[float, Prompt]]:
    """A task's prompts of one length with their depths; those that leave no three windows' room are left out."""
    seeds = [f"{grid.seed}-{i}" for i in range(grid.samples)]
    made = [(depth, prompt(task, tokenizer, essay, length, depth, WINDOWS * window, s)) for depth in grid.depths for s in seeds]
    return [(depth, one) for depth, one in made if one is not None]


def retrieval(
    variants: Mapping[str, Variant], tokenizer: Any, docs: Sequence[str], grid: Grid, window: int, report: Report
) -> list[dict[str, Any]]:
    """A row for each task, length and depth: share of answer tokens and of whole answers, by variant, with 95% intervals.

    Essays are `docs`. The interval takes every prompt for one trial, and `prompts` has the share of each, in the same order for
    all variants. Rows that leave no three windows' room are left out.
    """
    essay = essay_of(tokenizer, docs)
    cells, asked = list[tuple[str, int, float]](), list[Prompt]()
    for task, length in ((task, length) for task in grid.tasks for length in grid.lengths):
        for depth, one in prompts(task, tokenizer, essay, length, grid, window):
            cells.append((task, length, depth))
            asked.append(one)
    told = {name: [0.0] * len(asked) for name in variants}
    done = 0
    for some in batches(asked):
        for name, variant in variants.items():
            for i, share in zip(some, scores_of(variant, [asked[i] for i in some]), strict=True):
                told[name][i] = share
            done += len(some)
            report(done, len(asked) * len(variants))
    rows: list[dict[str, Any]] = []
    for cell in dict.fromkeys(cells):
        own = [i for i, other in enumerate(cells) if other == cell]
        scores = {name: summary([shares[i] for i in own]) for name, shares in told.items()}
        rows.append({**dict(zip(("task", "length", "depth"), cell, strict=True)), "samples": len(own), "scores": scores})
    return rows


def batches(asked: Sequence[Prompt]) -> list[list[int]]:
    """Prompts to read side by side: as long as each other, those of any task whose answers are about as long."""
    found: list[list[int]] = []
    for length in dict.fromkeys(len(one.ids) for one in asked):
        own = [i for i, one in enumerate(asked) if len(one.ids) == length]
        own.sort(key=lambda i: len(asked[i].told) - asked[i].told.index(True))
        side = max(TOKENS_AT_ONCE // length, 1)
        found += [own[start : start + side] for start in range(0, len(own), side)]
    return found


def summary(shares: Sequence[float]) -> dict[str, Any]:
    """The mean share of an answer, and of answers that are whole, with intervals."""
    accuracy, exact = sum(shares) / len(shares), sum(share == 1 for share in shares) / len(shares)
    intervals = {"interval": wilson(accuracy, len(shares)), "exact_interval": wilson(exact, len(shares))}
    return {"accuracy": accuracy, "exact": exact, **intervals, "prompts": list(shares)}


def by_length(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of each task and length as one, over its depths."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["length"]), []).append(row)
    found = []
    for (task, length), own in groups.items():
        names = list(own[0]["scores"])
        scores = {name: summary([x for row in own for x in row["scores"][name]["prompts"]]) for name in names}
        found.append({"task": task, "length": length, "samples": sum(row["samples"] for row in own), "scores": scores})
    return found
