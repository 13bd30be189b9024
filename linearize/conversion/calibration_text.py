"""What a conversion is calibrated on: rows of text, some of which ask for what they said before."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize import text
from linearize.conversion.plan import Plan
from linearize.conversion.streaming import CALIBRATION_ROWS, asking, calibration_shape
from linearize.documents import BUILTIN, chat_of, documents
from linearize.errors import InputError
from linearize.evaluation.recall_rows import TASKS, recall_row

OWN_LENGTH = 128
SHORTEST = 256  # tokens of a row that asks for something


@dataclass(frozen=True)
class CalibrationText:
    """Documents in `path`, by default the built-in ones, but for the percentage `held_out` of them by hash; in rows of `length`
    tokens where slots go by a learnt score, by default of 4,096."""

    path: Path | None = None
    held_out: int = text.HELD_OUT_PERCENT
    length: int | None = None


def own_text(model: Any) -> Tensor:
    """Token ids (rows, length) that the model itself samples, or random ones: for a conversion that is given no text."""
    if not model.can_generate():
        return torch.randint(model.config.vocab_size, (CALIBRATION_ROWS, OWN_LENGTH), device=model.device)
    begin = torch.tensor([[model.config.bos_token_id or 0]] * CALIBRATION_ROWS, device=model.device)
    length = min(OWN_LENGTH, getattr(model.config, "max_position_embeddings", OWN_LENGTH))
    options = {"do_sample": True, "max_length": length, "min_length": length, "pad_token_id": 0}
    return model.generate(begin, attention_mask=torch.ones_like(begin), **options)  # type: ignore[no-any-return]


def calibration_ids(tokenizer: Any, read: CalibrationText, plan: Plan | None = None) -> Tensor:
    """Token ids (rows, length): whole rows inside one document where there are any. InputError for rows that it has not.

    As long as the plan's model takes them and, where that is an encoder, framed by its special tokens. Where slots go by a learnt
    score, more rows follow to fit it, every other one with something in it that is asked for at its end: in the first of these, by
    which a state budget's search judges, it stands near the beginning, for what is said first must outlast everything.
    """
    docs = documents(str(read.path) if read.path is not None else BUILTIN, chat_of(tokenizer))
    training, _ = text.split(docs, read.held_out)
    tokens = text.tokenise(tokenizer, training)
    limit = plan.max_positions if plan is not None else None
    sizes = [min(len(doc), limit or len(doc)) for doc in tokens]
    try:
        count, length = calibration_shape(plan.mixers if plan is not None else (), sizes, read.length)
    except ValueError as error:
        where = str(read.path) if read.path is not None else "the built-in text"
        raise InputError(str(error), where, "a shorter --calibration-length, or longer texts for --calibration") from None
    encoder = plan is not None and not plan.architecture.causal
    rows = text.framed(tokenizer, tokens, length) if encoder else text.whole(tokens, length)
    asked = asking(count)
    step = max(len(rows) // (count - asked), 1)
    ids = rows.ids[::step][: count - asked]
    if not asked:
        return ids
    ids = ids.repeat(-(-(count - asked) // len(ids)), 1)[: count - asked]
    hidden = [
        recall_row(TASKS[i % len(TASKS)], tokenizer, tokens, ids.shape[1], f"calibration-{i}", within=(i + 1) / asked)
        for i in range(asked)
    ]
    return torch.cat([ids, torch.tensor(hidden)])
