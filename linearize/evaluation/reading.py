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
    same_as: str | None = None  # another variant that computes the very same: measured once


class Reader:
    """Call it with the next tokens of one text (1, n); it returns their logits (n, vocabulary), or the last `keep` of them."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.model: Any = variant.model
        self.device = next(variant.model.parameters()).device
        config: Any = variant.model.config
        self.cache: Any = DynamicCache(config=config)

    def __call__(self, ids: Tensor, keep: int = 0) -> Tensor:
        seen = self.cache.get_seq_length()
        positions = torch.arange(seen, seen + ids.shape[1], device=self.device)[None]
        with torch.no_grad(), self.variant.context():
            out = self.model(
                input_ids=ids.to(self.device), position_ids=positions, past_key_values=self.cache, use_cache=True,
                logits_to_keep=keep,
            )  # fmt: skip
        return out.logits[0]  # type: ignore[no-any-return]

    def feed(self, ids: Tensor, chunk: int = CHUNK) -> None:
        """Take in the next tokens of the text (1, n), a chunk at a time."""
        for start in range(0, ids.shape[1], chunk):
            self(ids[:, start : start + chunk], keep=1)

    def read(self, ids: Tensor, keep: int = 1) -> Tensor:
        """Logits (keep, vocabulary) after all of a text (1, T), the last `keep` tokens of it in one call."""
        self.feed(ids[:, :-keep])
        return self(ids[:, -keep:])

    def greedy(self, ids: Tensor, tokens: int, end: int | None = None) -> list[int]:
        """The likeliest continuation of a text (1, T), a token at a time, until `end`."""
        found: list[int] = []
        logits = self.read(ids)
        while len(found) < tokens:
            found.append(int(logits[-1].argmax()))
            if found[-1] == end:
                break
            logits = self(torch.tensor([[found[-1]]]))
        return found

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
