"""Perplexity, agreement and divergence of several variants of a model on the same tokens, by row and by position."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from linearize.evaluation.intervals import Interval, bounds
from linearize.evaluation.reading import CHUNK, Context, Reader, Variant
from linearize.text import Packed

POSITION_BLOCK = 256  # the width of a bin of positions
ROWS = 16  # tokens whose distributions are held at a time: a few megabytes, which caches keep
LOSS, DIVERGENCE, AGREE, TOKENS = range(4)


@dataclass
class Sums:
    """What is added up: for each row, (bins, 4) of loss, divergence, agreement and tokens by position in the document.

    Targets at document boundaries do not count.
    """

    rows: list[Tensor] = field(default_factory=list)

    def total(self, column: int) -> float:
        return float(sum(row[:, column].sum() for row in self.rows))

    @property
    def loss(self) -> float:
        return self.total(LOSS)

    @property
    def divergence(self) -> float:
        return self.total(DIVERGENCE)

    @property
    def agree(self) -> int:
        return int(self.total(AGREE))

    @property
    def tokens(self) -> int:
        return int(self.total(TOKENS))

    @property
    def perplexity(self) -> float:
        return perplexity_of(self.loss, self.tokens)

    @property
    def by_row(self) -> list[float]:
        return [float(row[:, LOSS].sum() / row[:, TOKENS].sum().clamp(min=1)) for row in self.rows]

    def between(self, first: int, last: int) -> Tensor:
        """(N, 4): the sums of each row over targets at positions from `first` to before `last`, whole bins."""
        start, stop = first // POSITION_BLOCK, -(-last // POSITION_BLOCK)
        return torch.stack([row[start:stop].sum(0) for row in self.rows])


def perplexity_of(loss: float, tokens: float) -> float:
    return math.exp(min(loss / max(tokens, 1), 50.0))


def compare(variants: list[Variant], rows: Packed | Sequence[Packed], report: Callable[[int, int], None]) -> list[Sums]:
    """Sums of each variant; agreement and divergence are against the first, which is the teacher where there is one.

    Rows of one document are read in chunks, all variants side by side, so that logits of one chunk are held at a time.
    """
    sums, names = [Sums() for _ in variants], [v.name for v in variants]
    measured = [i for i, v in enumerate(variants) if v.same_as not in names]
    texts = list(singles(rows))
    chunks = [list(chunked(row)) for row in texts]
    done, total = 0, sum(map(len, chunks)) * len(measured)
    for row, parts in zip(texts, chunks, strict=True):
        bins = int(row.positions.max()) // POSITION_BLOCK + 1
        for i in measured:
            sums[i].rows.append(torch.zeros(bins, 4, dtype=torch.float64))
        readers = {i: Reader(variants[i]) for i in measured} if len(parts) > 1 else {}
        for start, stop in parts:
            reference: Tensor | None = None
            for i in measured:
                if readers:
                    logits = readers[i](row.ids[:, start:stop])[0]
                else:
                    logits = logits_of(variants[i], row.ids, row.positions)
                targets, positions = row.ids[0, start + 1 : stop + 1], row.positions[0, start + 1 : stop + 1]
                reference = logits if reference is None else reference
                _add(sums[i].rows[-1], logits, reference, targets.to(logits.device), positions)
                done += 1
                report(done, total)
    return [sums[names.index(v.same_as)] if v.same_as in names else s for v, s in zip(variants, sums, strict=True)]


def singles(rows: Packed | Sequence[Packed]) -> Iterator[Packed]:
    """One row (1, T) at a time."""
    for packed in [rows] if isinstance(rows, Packed) else rows:
        for i in range(len(packed)):
            yield Packed(packed.ids[i : i + 1], packed.positions[i : i + 1])


def chunked(row: Packed) -> Iterator[tuple[int, int]]:
    """Where to cut a row (1, T); one that holds several documents stays whole, for no cache tells them apart."""
    time = row.ids.shape[1]
    size = CHUNK if torch.equal(row.positions[0], torch.arange(time)) else time
    for start in range(0, time, size):
        yield start, min(start + size, time)


def logits_of(variant: Variant, ids: Tensor, positions: Tensor) -> Tensor:
    """Logits (T, vocabulary) of one packed row (1, T)."""
    device = next(variant.model.parameters()).device
    with torch.no_grad(), variant.context():
        out = variant.model(input_ids=ids.to(device), position_ids=positions.to(device), use_cache=False)
    return out.logits[0]  # type: ignore[no-any-return]


def _add(sums: Tensor, own: Tensor, reference: Tensor, targets: Tensor, positions: Tensor) -> None:
    """Add the tokens of a chunk, of logits (T, V), to the bins (bins, 4) of their positions.

    A document's first token is told from nothing and does not count.
    """
    found = []
    for start in range(0, len(targets), ROWS):
        block = slice(start, min(start + ROWS, len(targets)))
        mine = own[block].float().log_softmax(-1)
        loss, first = -mine.gather(1, targets[block, None])[:, 0], mine.argmax(-1)
        if own is reference:
            divergence, agree = torch.zeros_like(loss), torch.ones_like(loss)
        else:
            other = reference[block].float().log_softmax(-1)
            agree = first == other.argmax(-1)
            divergence = -mine.sub_(other).mul_(other.exp_()).sum(-1)
        found.append(torch.stack([loss.double(), divergence.double(), agree.double(), torch.ones_like(loss).double()], -1))
    counted = positions > 0
    if found:
        sums.index_add_(0, positions[counted] // POSITION_BLOCK, torch.cat(found).cpu()[counted])


def figures(cells: Tensor, first: Tensor | None, weights: Tensor) -> dict[str, Any]:
    """Perplexity, ratio to the first variant, top-1 agreement and KL of rows (N, 4), each with its interval.

    `weights` (R, N) are the bootstrap's; the ratio is drawn in pairs, the same documents above and below. `first` is None
    where there is no teacher, and then only perplexity is known.
    """
    drawn = weights @ cells

    def interval(values: Tensor) -> Interval | None:
        return bounds(values.where(drawn[:, TOKENS] > 0, torch.nan))

    def perplexity(sums: Tensor) -> Tensor:
        return (sums[..., LOSS] / sums[..., TOKENS].clamp(min=1)).clamp(max=50.0).exp()

    total = cells.sum(0)
    found: dict[str, Any] = {"perplexity": float(perplexity(total)), "perplexity_interval": interval(perplexity(drawn))}
    columns: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "ratio": lambda own, teacher: perplexity(own) / perplexity(teacher),
        "top1": lambda own, _: own[..., AGREE] / own[..., TOKENS].clamp(min=1),
        "kl": lambda own, _: own[..., DIVERGENCE] / own[..., TOKENS].clamp(min=1),
    }
    for name, figure in columns.items():
        found[name] = None if first is None else float(figure(total, first.sum(0)))
        found[f"{name}_interval"] = None if first is None else interval(figure(drawn, weights @ first))
    return found


__all__ = ["Context", "Sums", "Variant", "compare", "figures"]
