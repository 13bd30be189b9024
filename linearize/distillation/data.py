"""The rows that stages learn from: the training side of every source, packed or framed to each stage's length, recall mixed in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from linearize import text
from linearize.documents import Chat, documents, is_teacher
from linearize.evaluation.recall_rows import mixed
from linearize.methods.base import Stage
from linearize.modeling.plans import is_causal
from linearize.recipe import Recipe


def training_documents(sources: Sequence[str], chat: Chat, held_out: int = text.HELD_OUT_PERCENT) -> list[str]:
    """The training side of every written source's own split, so that what is held out of one stays so beside others."""
    written = [source for source in sources if not is_teacher(source)]
    return [document for source in written for document in text.split(documents(source, chat), held_out)[0]]


@dataclass
class Rows:
    """The rows that a stage learns from, by their length."""

    recipe: Recipe
    plan: Mapping[str, Any]
    tokenizer: Any
    encoded: list[list[int]]
    made: dict[int, text.Packed] = field(default_factory=dict)

    def __call__(self, stage: Stage) -> text.Packed:
        length = self.length(stage)
        if length not in self.made:
            causal = is_causal(self.plan)
            rows = text.pack(self.encoded, length) if causal else text.framed(self.tokenizer, self.encoded, length)
            self.made[length] = mixed(rows, self.recipe.recall, self.tokenizer, self.encoded, self.recipe.seed)
        return self.made[length]

    def add(self, docs: Sequence[str]) -> None:
        """The training side of more documents."""
        self.encoded += text.tokenise(self.tokenizer, text.split(docs, self.recipe.held_out)[0])

    def length(self, stage: Stage) -> int:
        """Tokens of a stage's rows."""
        length = stage.sequence or self.recipe.sequence
        return min(length, self.plan.get("max_positions") or length)

    @property
    def mask_token(self) -> int | None:
        return None if is_causal(self.plan) else self.tokenizer.mask_token_id
