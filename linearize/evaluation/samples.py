"""What teacher and student say, side by side, and how often they repeat themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from linearize.evaluation.reading import Reader, Variant
from linearize.evaluation.texts import Texts

PROMPT, ANSWER, COUNT, GRAM = 192, 48, 3, 4


def repetition(ids: Sequence[int], gram: int = GRAM) -> float:
    """The share of runs of four tokens that stood there before: 0 where nothing comes twice."""
    runs = [tuple(ids[i : i + gram]) for i in range(len(ids) - gram + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def side_by_side(
    variants: Sequence[Variant], tokenizer: Any, texts: Texts, report: Callable[[int, int], None]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Greedy continuations of the first tokens of up to three documents by each variant, and each one's mean repetition rate."""
    rows = dict(reversed(list(zip(texts.documents, texts.rows, strict=True))))
    chosen = [row.ids[0] for row in list(rows.values())[-COUNT:][::-1]]
    prompts = [ids[: min(PROMPT, max(len(ids) // 2, 1))] for ids in chosen]
    found: list[dict[str, Any]] = [{"prompt": tokenizer.decode(ids.tolist()), "answers": {}} for ids in prompts]
    rates: dict[str, list[float]] = {v.name: [] for v in variants}
    done = 0
    for variant in variants:
        for length in sorted({len(ids) for ids in prompts}):
            own = [i for i, ids in enumerate(prompts) if len(ids) == length]
            every = Reader(variant).greedy(torch.stack([prompts[i] for i in own]), ANSWER, tokenizer.eos_token_id)
            for i, said in zip(own, every, strict=True):
                found[i]["answers"][variant.name] = tokenizer.decode(said)
                rates[variant.name].append(repetition(said))
            done += len(own)
            report(done, len(prompts) * len(variants))
    return found, {name: sum(x) / len(x) for name, x in rates.items() if x}
