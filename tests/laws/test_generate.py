"""Law 10: generate() gives the same tokens with a cache and without, alone and in a batch, at once and in turns."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from linearize.modeling.spec import MixerSpec
from linearize.testing import linearized, method_points, own_points, tiny_llama
from linearize.testing.laws import assert_close
from linearize.testing.points import REPRESENTATIVE

POINTS = {
    f"{p.id}-{'mha' if i % 2 else 'gqa'}": (p.spec, 4 if i % 2 else 2, (0, 1)) for i, p in enumerate(method_points(REPRESENTATIVE))
}
POINTS["default-beside-softmax"] = (method_points()[0].spec, 2, (1,))
PUBLISHED = [next(key for key in POINTS if key.startswith(name)) for name in REPRESENTATIVE]
REST = [name for name in own_points() if name not in REPRESENTATIVE]
each_model = pytest.mark.parametrize("model", POINTS, indirect=True)
each_method = pytest.mark.parametrize("model", PUBLISHED, indirect=True)
NEW = 10  # more than two windows of four


@cache
def model_of(spec: MixerSpec, kv_heads: int, layers: tuple[int, ...]) -> Any:
    return linearized(tiny_llama(kv_heads), spec, layers)


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Any:
    return model_of(*POINTS[request.param])


def prompt(*size: int, seed: int = 3) -> Tensor:
    return torch.randint(2, 64, size, generator=torch.Generator().manual_seed(seed))


def generate(model: Any, ids: Tensor, **options: Any) -> Tensor:
    chosen = {"do_sample": False, "max_new_tokens": NEW, "attention_mask": torch.ones_like(ids), **options}
    torch.manual_seed(0)
    return model.generate(ids, generation_config=GenerationConfig(pad_token_id=0, eos_token_id=None), **chosen)


WAYS = {"greedy": {}, "beams": {"num_beams": 4, "num_return_sequences": 3}}


@each_model
@pytest.mark.parametrize("way", WAYS)
def test_with_a_cache_and_without(model: Any, way: str) -> None:
    options, ids = WAYS[way], prompt(4, 11)
    cached = generate(model, ids, **options)
    assert torch.equal(cached, generate(model, ids, use_cache=False, **options))
    assert cached.shape == (4 * options.get("num_return_sequences", 1), 11 + NEW)
    assert len(cached[:, 11:].unique()) > 3, "the model says too little for the comparison to mean anything"


@pytest.mark.parametrize("name", REST)
def test_every_other_method(name: str) -> None:
    """The same for a left-padded batch."""
    model, ids = model_of(own_points()[name], 2, (0, 1)), prompt(2, 11)
    ids[0, :4] = 0
    options = {"attention_mask": (ids > 0).long()}
    cached = generate(model, ids, **options)
    assert torch.equal(cached, generate(model, ids, use_cache=False, **options))
    assert torch.equal(generate(model, ids[:1, 4:])[0], cached[0, 4:])


def test_samples_with_a_cache_and_without() -> None:
    model, ids = model_of(*next(iter(POINTS.values()))), prompt(2, 11)
    options = {"do_sample": True, "num_return_sequences": 3}
    cached = generate(model, ids, **options)
    assert torch.equal(cached, generate(model, ids, use_cache=False, **options))
    assert len({tuple(row) for row in cached.tolist()}) == 6


@each_method
def test_prefill_in_pieces(model: Any) -> None:
    ids = prompt(2, 19)
    assert torch.equal(generate(model, ids, prefill_chunk_size=5), generate(model, ids))


@each_method
def test_left_padded_batch(model: Any) -> None:
    """Rows of a batch, by beams, are the same prompts alone."""
    rows = [prompt(1, length, seed=length) for length in (3, 13)]
    ids = torch.cat([torch.nn.functional.pad(row, (13 - row.shape[1], 0)) for row in rows])
    batch = generate(model, ids, attention_mask=(ids > 0).long(), num_beams=2)
    for row, found in zip(rows, batch, strict=True):
        assert torch.equal(generate(model, row, num_beams=2)[0], found[13 - row.shape[1] :])


@each_model
def test_chat_with_a_kept_cache(model: Any) -> None:
    """Each turn goes on from the cache; the whole talk from scratch says the same."""
    talk, kept = prompt(1, 6), DynamicCache(config=model.config)
    for turn in range(3):
        talk = torch.cat([talk, prompt(1, 3 + turn, seed=turn)], 1)
        answered = generate(model, talk, past_key_values=kept, max_new_tokens=7)
        assert torch.equal(answered, generate(model, talk, max_new_tokens=7)), f"turn {turn}"
        assert kept.get_seq_length() == answered.shape[1] - 1
        talk = answered


@each_model
def test_prompt_lookup(model: Any) -> None:
    """Assisted decoding, whose rejected tokens are cropped from the cache, says what plain decoding says."""
    ids = prompt(1, 5).repeat(1, 4)
    expected, calls = generate(model, ids, max_new_tokens=20), []
    watch = model.model.register_forward_hook(lambda _, __, output: calls.append(output.last_hidden_state.shape[1]))
    found = generate(model, ids, max_new_tokens=20, prompt_lookup_num_tokens=4)
    watch.remove()
    assert torch.equal(found, expected)
    assert sum(calls) > 20 + ids.shape[1], "no token was offered, let alone rejected"


def test_continuous_batching_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="use generate"):
        model_of(*POINTS["default-beside-softmax"]).generate_batch([[1, 2]])


@each_method
@torch.no_grad()
def test_logits_in_bf16(model: Any) -> None:
    """Step by step against one call; every product of two layers rounds to 8 bits, and roundings do not agree."""
    model = copy.deepcopy(model).to(torch.bfloat16)
    ids, filled = prompt(2, 20), DynamicCache(config=model.config)
    steps = [model(ids[:, t : t + 1], past_key_values=filled).logits for t in range(20)]
    assert_close(torch.cat(steps, 1).float(), model(ids).logits.float(), 2.0**-5, "bf16")
