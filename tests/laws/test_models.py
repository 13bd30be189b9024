"""Laws 3, 4, 7, 8 and 9 for a whole converted model: padding, packing, softmax recovered, untouched layers, the cache."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from linearize.modeling.modeling_linearized import attentions, mode
from linearize.modeling.spec import MixerSpec
from linearize.testing import linearized, method_points, tiny_llama, tiny_shape
from linearize.testing.laws import EXACT, assert_close
from linearize.testing.points import REPRESENTATIVE

POINTS = {f"{p.id}-{'mha' if i % 2 else 'gqa'}": (p.spec, 4 if i % 2 else 2) for i, p in enumerate(method_points(REPRESENTATIVE))}
each_method = pytest.mark.parametrize(("spec", "kv_heads"), POINTS.values(), ids=POINTS)
TIME = 23
FP64 = EXACT[torch.float64]
WINDOW = MixerSpec(merge="near", feature_map="identity", window=4, sinks=2)


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


@cache
def model_of(spec: MixerSpec, kv_heads: int, dtype: torch.dtype = torch.float64) -> Any:
    return linearized(tiny_llama(kv_heads), spec).to(dtype)


def tokens(batch: int = 2, time: int = TIME) -> Tensor:
    return torch.randint(2, 64, (batch, time), generator=torch.Generator().manual_seed(5))


def padded(ids: Tensor, rows: list[str]) -> tuple[Tensor, Tensor]:
    mask = torch.tensor([[int(x) for x in row] for row in rows])
    frame = torch.full(mask.shape, 7)
    frame[mask.bool()] = ids.flatten()
    return frame, mask


# ---- 3 and 4 ----


@each_method
def test_padding(spec: MixerSpec, kv_heads: int) -> None:
    """Positions come from the mask where the caller gives none, in one call and in a cache filled by several."""
    model, ids = model_of(spec, kv_heads), tokens(3, 12)
    frame, mask = padded(ids, ["0000111111111111", "1111111111110000", "1110011111001111"])
    expected = model(ids).logits
    assert_close(model(frame, attention_mask=mask).logits[mask.bool()].view_as(expected), expected, FP64, "one call")
    filled, outputs = DynamicCache(config=model.config), []
    for start, stop in [(0, 7), (7, 8), (8, 9), (9, 16)]:
        outputs.append(model(frame[:, start:stop], attention_mask=mask[:, :stop], past_key_values=filled).logits)
    assert_close(torch.cat(outputs, 1)[mask.bool()].view_as(expected), expected, FP64, "several calls")


@each_method
def test_packing(spec: MixerSpec, kv_heads: int) -> None:
    """Documents are told by resets of position_ids or by cu_seq_lens."""
    model, ids, cuts = model_of(spec, kv_heads), tokens(1), [0, 9, 10, TIME]
    spans = list(pairwise(cuts))
    apart = torch.cat([model(ids[:, a:b]).logits for a, b in spans], 1)
    position = torch.cat([torch.arange(b - a) for a, b in spans])[None]
    assert_close(model(ids, position_ids=position).logits, apart, FP64, "position_ids")
    lengths = torch.tensor(cuts, dtype=torch.int32)
    packed = model(ids, position_ids=position, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths, max_length_q=13, max_length_k=13)
    assert_close(packed.logits, apart, FP64, "cu_seq_lens")


# ---- 5 ----


@each_method
def test_causality(spec: MixerSpec, kv_heads: int) -> None:
    model, ids = model_of(spec, kv_heads, torch.float32), tokens()
    changed = ids.clone()
    changed[:, 11] = 1
    before, after = model(ids).logits, model(changed).logits
    assert_close(after[:, :11], before[:, :11], 1e-6, "logits before the change")
    assert not torch.allclose(after[:, 11:], before[:, 11:])


# ---- 7 ----


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("kind", ["sliding", "terraced"])
def test_near_half_alone_is_softmax(kind: str, kv_heads: int, dtype: torch.dtype, bound: float) -> None:
    base = tiny_llama(kv_heads).to(dtype)
    for sinks, window in ((0, TIME), (3, TIME), (3, TIME - 3)):
        model = linearized(base, replace(WINDOW, window=window, sinks=sinks, window_kind=kind))
        assert_close(model(tokens()).logits, base(tokens()).logits, bound, f"window {window}, sinks {sinks}")


@each_method
def test_an_empty_far_half_has_no_weight(spec: MixerSpec, kv_heads: int) -> None:
    if spec.merge != "denominator":
        pytest.skip(f"merge '{spec.merge}' weighs the far half from the first token on")
    base, ids = tiny_llama(kv_heads).double(), tokens()
    model = linearized(base, replace(spec, window=TIME - spec.sinks, kv_dtype="model"))  # in 8 bits keys are not the teacher's
    for attention in attentions(model):
        if attention.linearize.far_mass.kind != "none":
            attention.linearize.far_mass.bias.data.add_(1000.0)  # however much the memory would weigh, were it not empty
    assert_close(model(ids).logits, base(ids).logits, FP64, "far memory empty")


# ---- 8 ----


@each_method
def test_untouched_layers(spec: MixerSpec, kv_heads: int) -> None:
    """Bit-equal: the layer before the converted one, and the whole model with its mixers switched off."""
    base, ids = tiny_llama(kv_heads), tokens()
    model = linearized(base, spec, layers=[1])
    seen, expected = (m(ids, output_hidden_states=True) for m in (model, base))
    assert torch.equal(seen.hidden_states[1], expected.hidden_states[1])
    assert not torch.allclose(seen.hidden_states[2], expected.hidden_states[2])
    with mode(model, "teacher"):
        assert torch.equal(model(ids).logits, expected.logits)
    assert torch.equal(model(ids).logits, seen.logits), "the teacher left a trace"


# ---- 9 ----


@each_method
def test_cache_has_one_size(spec: MixerSpec, kv_heads: int) -> None:
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        model, filled = linearized(tiny_llama(kv_heads), spec).to(dtype), DynamicCache()
        sizes = []
        for time in (1, 1, 40, 1):
            model(tokens(1, time), past_key_values=filled)
            sizes.append([layer.nbytes for layer in filled.layers])
        assert sizes == [[spec.state_bytes(tiny_shape(kv_heads), size)] * 2] * 4
        assert filled.get_seq_length() == 43


@each_method
def test_crop_of_the_recorded_call(spec: MixerSpec, kv_heads: int) -> None:
    """While it records, a cache forgets any of the last call's tokens; what was not recorded, never."""
    model, ids = model_of(spec, kv_heads), tokens()
    for kept in (0, 1, 4, 9):
        cropped, straight = DynamicCache(config=model.config), DynamicCache(config=model.config)
        model(ids[:, :6], past_key_values=straight)
        model(ids[:, :6], past_key_values=cropped)
        cropped.activate_past_recording()
        model(ids[:, 6:16], past_key_values=cropped)
        cropped.crop(kept - 10)
        if kept:
            model(ids[:, 6 : 6 + kept], past_key_values=straight)
        assert cropped.get_seq_length() == straight.get_seq_length() == 6 + kept
        for own, other in zip(cropped.layers, straight.layers, strict=True):
            for name, x in own.state.items():
                assert_close(x.double(), other.state[name].double(), FP64, name)
        with pytest.raises(ValueError, match="cannot forget"):
            cropped.crop(-1)
        rest = ids[:, 6 + kept :]
        found, expected = (model(rest, past_key_values=filled).logits for filled in (cropped, straight))
        assert_close(found, expected, FP64, f"after a crop to {kept}")


def test_a_cache_by_another_name_is_refused() -> None:
    """A version of transformers that renames the keyword would leave the mixer without its state, and say nothing."""
    model = model_of(*next(iter(POINTS.values())))
    angles = torch.ones(1, TIME, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="calls the cache 'cache'"):
        attentions(model)[0](torch.zeros(1, TIME, 32, dtype=torch.float64), (angles, angles), None, cache=DynamicCache())


def test_crop_is_refused_where_nothing_was_recorded() -> None:
    model, filled = model_of(*next(iter(POINTS.values()))), DynamicCache()
    filled.crop(-3)  # nothing there, nothing to forget
    model(tokens(), past_key_values=filled)
    for unrecorded in (-1, -TIME, -TIME - 1):
        with pytest.raises(ValueError, match="cannot forget"):
            filled.crop(unrecorded)
    filled.activate_past_recording()
    model(tokens(time=4), past_key_values=filled)
    with pytest.raises(ValueError, match="cannot forget 5 tokens: it records the last 4"):
        filled.crop(-5)
    filled.crop(-4)


@each_method
def test_cache_forks_and_reorders(spec: MixerSpec, kv_heads: int) -> None:
    model, ids, rest = model_of(spec, kv_heads), tokens(3), tokens(3, 30)[:, TIME:]
    filled = DynamicCache(config=model.config)
    model(ids, past_key_values=filled)
    fork, picked, repeated = (copy.deepcopy(filled) for _ in range(3))
    before = [dict(layer.state) for layer in filled.layers]
    expected = model(rest, past_key_values=filled).logits
    assert torch.equal(model(rest, past_key_values=fork).logits, expected)
    rows = torch.tensor([2, 2, 0])
    picked.reorder_cache(rows)
    for layer, state in zip(picked.layers, before, strict=True):
        assert all(torch.equal(x, state[name][rows]) for name, x in layer.state.items())
    assert_close(model(rest[rows], past_key_values=picked).logits, expected[rows], FP64, "rows reordered")
    repeated.batch_repeat_interleave(2)
    repeated.batch_select_indices(torch.tensor([1, 4]))
    found = model(rest[[0, 2]], past_key_values=repeated).logits
    assert_close(found, expected[[0, 2]], FP64, "rows repeated, then chosen")
