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
    found: list[dict[str, Any]] = []
    rates: dict[str, list[float]] = {v.name: [] for v in variants}
    chosen = list(rows.values())[-COUNT:][::-1]
    for row in chosen:
        ids = row.ids[:, : min(PROMPT, max(row.ids.shape[1] // 2, 1))]
        sample: dict[str, Any] = {"prompt": tokenizer.decode(ids[0].tolist()), "answers": {}}
        for variant in variants:
            said = Reader(variant).greedy(torch.as_tensor(ids), ANSWER, tokenizer.eos_token_id)
            sample["answers"][variant.name] = tokenizer.decode(said)
            rates[variant.name].append(repetition(said))
            report(len(found) * len(variants) + len(sample["answers"]), len(chosen) * len(variants))
        found.append(sample)
    return found, {name: sum(x) / len(x) for name, x in rates.items() if x}
