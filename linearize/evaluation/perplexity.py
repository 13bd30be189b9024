"""Perplexity, agreement and divergence of several variants of a model on the same tokens, a row at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from linearize.text import Packed

POSITION_BLOCK = 256
Context = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Variant:
    """A row of the table: a model, and the context it runs in."""

    name: str
    model: nn.Module
    context: Context = nullcontext
    state_bytes: int | None = None
    same_as: str | None = None  # another variant that computes the very same: measured once


@dataclass
class Sums:
    """What is added up over rows; targets at document boundaries do not count."""

    loss: float = 0.0
    agree: int = 0
    divergence: float = 0.0
    tokens: int = 0
    by_row: list[float] = field(default_factory=list)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss / max(self.tokens, 1), 50.0))


def logits_of(variant: Variant, ids: Tensor, positions: Tensor) -> Tensor:
    """Logits (T, vocabulary) of one packed row (1, T)."""
    with torch.no_grad(), variant.context():
        out = variant.model(input_ids=ids, position_ids=positions, use_cache=False)
    return out.logits[0]  # type: ignore[no-any-return]


def compare(variants: list[Variant], rows: Packed, report: Callable[[int, int], None]) -> list[Sums]:
    """Sums of each variant; agreement and divergence are against the first, which is the teacher where there is one."""
    sums = [Sums() for _ in variants]
    for number in range(len(rows)):
        ids, positions = rows.ids[number : number + 1], rows.positions[number : number + 1]
        device = next(variants[0].model.parameters()).device
        ids, positions = ids.to(device), positions.to(device)
        counted = positions[0, 1:] > 0  # the first token of a document has nothing to be told from
        reference: Tensor | None = None
        for index, variant in enumerate(variants):
            if variant.same_as is not None:
                continue
            logits = logits_of(variant, ids, positions)[:-1]
            reference = logits if reference is None else reference
            _add(sums[index], logits, reference, ids[0, 1:], counted)
            report(number * len(variants) + index + 1, len(rows) * len(variants))
    names = [v.name for v in variants]
    return [s if v.same_as is None else sums[names.index(v.same_as)] for v, s in zip(variants, sums, strict=True)]


def _add(sums: Sums, logits: Tensor, reference: Tensor, targets: Tensor, counted: Tensor) -> None:
    loss = 0.0
    for start in range(0, len(targets), POSITION_BLOCK):
        block = slice(start, start + POSITION_BLOCK)
        keep = counted[block]
        own = logits[block][keep].float().log_softmax(-1)
        other = reference[block][keep].float().log_softmax(-1)
        loss += float(-own.gather(1, targets[block][keep][:, None]).sum())
        sums.agree += int((own.argmax(-1) == other.argmax(-1)).sum())
        sums.divergence += float((other.exp() * (other - own)).sum())
        sums.tokens += int(keep.sum())
    sums.loss += loss
    sums.by_row.append(loss / max(int(counted.sum()), 1))
