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
WINDOWS = 3  # how far away what is hidden must be, in windows of the student
TASKS = ("pass-key", "s-niah-1", "s-niah-2", "s-niah-3", "multi-key", "variable-tracking", "mqar", "chain", "copying")


@dataclass(frozen=True)
class Prompt:
    """A text of exactly so many tokens, which of its last ones are to be told, and where what is asked for ends."""

    ids: Tokens
    told: list[bool]
    end_of_hidden: int


@dataclass(frozen=True)
class Grid:
    """What is asked: tasks, lengths in tokens, depths of the last hidden piece (0 the start, 1 three windows before the end)."""

    tasks: tuple[str, ...] = TASKS
    lengths: tuple[int, ...] = (512, 1024)
    depths: tuple[float, ...] = (0.25, 0.75)
    samples: int = 1
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
        end, told = end + new, told + [answer] * len(new)
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


def score(variant: Variant, asked: Prompt) -> tuple[float, bool]:
    """The share of the answer's tokens that are the model's first choice, each given the true ones before it; and if all are."""
    ids = torch.tensor([asked.ids])
    keep = len(asked.told) + 1
    chosen = Reader(variant).read(ids, keep)[:-1].argmax(-1).cpu()
    right = (chosen == ids[0, 1 - keep :])[torch.tensor(asked.told)]
    return float(right.float().mean()), bool(right.all())


def retrieval(
    variants: Mapping[str, Variant], tokenizer: Any, docs: Sequence[str], grid: Grid, window: int, report: Report
) -> list[dict[str, Any]]:
    """A row for each task, length and depth: share of answer tokens and of whole answers, by variant, with 95% intervals.

    Essays are `docs`. The interval takes every prompt for one trial. Rows that leave no three windows' room are left out.
    """
    essay = [token for doc in docs[:64] for token in tokenizer(doc, add_special_tokens=False, verbose=False)["input_ids"]][:100_000]
    rows: list[dict[str, Any]] = []
    done, total = 0, len(grid.tasks) * len(grid.lengths) * len(grid.depths) * grid.samples * len(variants)
    for task in grid.tasks:
        for length in grid.lengths:
            for depth in grid.depths:
                seeds = [f"{grid.seed}-{i}" for i in range(grid.samples)]
                made = [prompt(task, tokenizer, essay, length, depth, WINDOWS * window, seed) for seed in seeds]
                asked = [x for x in made if x is not None]
                row: dict[str, Any] = {"task": task, "length": length, "depth": depth, "samples": len(asked), "scores": {}}
                for name, variant in variants.items():
                    scores = []
                    for one in asked:
                        scores.append(score(variant, one))
                        done += 1
                        report(done, total)
                    if scores:
                        row["scores"][name] = summary(scores)
                rows += [row] if asked else []
    return rows


def summary(scores: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    accuracy = sum(share for share, _ in scores) / len(scores)
    return {"accuracy": accuracy, "interval": wilson(accuracy, len(scores)), "exact": sum(all_ for _, all_ in scores) / len(scores)}


def by_length(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of each task and length as one, over its depths."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["length"]), []).append(row)
    found = []
    for (task, length), own in groups.items():
        count = sum(row["samples"] for row in own)
        scores = {}
        for name in own[0]["scores"]:
            mean = {key: sum(r["scores"][name][key] * r["samples"] for r in own) / count for key in ("accuracy", "exact")}
            scores[name] = {**mean, "interval": wilson(mean["accuracy"], count)}
        found.append({"task": task, "length": length, "samples": count, "scores": scores})
    return found
