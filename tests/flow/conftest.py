"""A tiny subject of benchmarks, timed by a clock that models move."""

from __future__ import annotations

import pytest
from cli.tiny import tokenizer
from flow.clock import MACHINE, SPEC, Clock

from linearize.benchmarks.subject import Subject
from linearize.testing.models import linearized, tiny_llama


@pytest.fixture
def subject() -> Subject:
    words = tokenizer()
    model = linearized(tiny_llama(max_position_embeddings=4096, vocab_size=len(words)), SPEC)
    model.config.linearize["method"] = "default"
    return Subject("tiny", model, words, lambda: MACHINE, Clock())
