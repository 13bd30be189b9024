"""A variant of a model reading a text chunk by chunk on its own cache: memory is bounded by the chunk, not by the text."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

CHUNK = 1024
Context = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Variant:
    """A row of the table: a model, and the context it runs in."""

    name: str
    model: nn.Module
    context: Context = nullcontext
    state_bytes: int | None = None
    same_as: str | None = None  # another variant that computes the very same: where both are asked for, measured once


class Reader:
    """Call it with the next tokens of texts as long as each other (B, n): their logits (B, n, vocabulary), or the last `keep`."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.model: Any = variant.model
        self.device = next(variant.model.parameters()).device
        config: Any = variant.model.config
        self.cache: Any = DynamicCache(config=config)

    def __call__(self, ids: Tensor, keep: int = 0) -> Tensor:
        seen = self.cache.get_seq_length()
        positions = torch.arange(seen, seen + ids.shape[1], device=self.device).expand(ids.shape)
        with torch.no_grad(), self.variant.context():
            out = self.model(
                input_ids=ids.to(self.device), position_ids=positions, past_key_values=self.cache, use_cache=True,
                logits_to_keep=keep,
            )  # fmt: skip
        return out.logits  # type: ignore[no-any-return]

    def feed(self, ids: Tensor, chunk: int = CHUNK) -> Tensor:
        """Take in the next tokens of the texts (B, n), a chunk at a time: the logits (B, 1, vocabulary) after the last."""
        for start in range(0, ids.shape[1], chunk):
            logits = self(ids[:, start : start + chunk], keep=1)
        return logits

    def read(self, ids: Tensor) -> Tensor:
        """The likeliest token (B,) after all of the texts (B, T)."""
        return self.feed(ids)[:, -1].argmax(-1).cpu()

    def greedy(self, ids: Tensor, tokens: int, end: int | None = None) -> list[list[int]]:
        """The likeliest continuation of each text (B, T), a token at a time, up to its `end`."""
        told = [self.read(ids)]
        while len(told) < tokens and not all(end in row for row in torch.stack(told, 1).tolist()):
            told.append(self.read(told[-1][:, None]))
        rows: list[list[int]] = torch.stack(told, 1).tolist()
        return [row[: row.index(end) + 1] if end in row else row for row in rows]

    def filled(self, ids: Tensor, open_: Tensor) -> Tensor:
        """The likeliest token (B, n) at each of the last n places of texts (B, T), where it stands itself if `open_` (B, n).

        As in a form: what is not open is given, what is open follows from what the model wrote there before.
        """
        count = open_.shape[1]
        start, given = ids.shape[1] - count, ids[:, -count:]
        told = [self.read(ids[:, :start])]
        for i in range(count - 1):
            told.append(self.read(torch.where(open_[:, i], told[-1], given[:, i])[:, None]))
        return torch.stack(told, 1)

    def nbytes(self) -> int:
        """Bytes that the cache holds: states, and keys and values where there are any."""
        total = 0
        for layer in self.cache.layers:
            if getattr(layer, "is_linearize_layer", False):
                total += layer.nbytes
            else:
                kept = (getattr(layer, name, None) for name in ("keys", "values"))
                total += sum(x.numel() * x.element_size() for x in kept if x is not None)
        return total
