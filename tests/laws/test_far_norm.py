"""A far half that takes queries and keys from before the layer's own norms sees what the layer projects."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from linearize.conversion.convert import convert_model
from linearize.modeling.attention import LinearizedAttention, norm_of
from linearize.modeling.modeling_linearized import attentions, mode, observed
from linearize.modeling.stream import Inputs
from linearize.testing import randomise
from linearize.testing.families import tiny_family
from linearize.testing.laws import EXACT, assert_close

FP64 = EXACT[torch.float64]
IDS = torch.randint(2, 97, (2, 19), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["qwen3", "olmo2", "gemma3_text", "phi", "stablelm", "llama"])
def model(request: pytest.FixtureRequest) -> Any:
    """Norms of each head, of all heads together, of heads before tokens, a layer norm, one for each head, and none."""
    changes = {"qk_layernorm": True} if request.param == "stablelm" else {}
    made = convert_model(tiny_family(request.param, **changes), method="gated-deltanet", options={"native": True}, calibration=IDS)
    for attention in attentions(made):
        randomise(attention.linearize)
    return made.double().eval()


def forgets(model: Any) -> bool:
    return all(getattr(module, "linearize_input", None) is None for module in model.modules())


@torch.no_grad()
def test_raw_queries_and_keys_are_the_projections(model: Any) -> None:
    seen = []

    def observer(attention: LinearizedAttention, inputs: Inputs, target: Tensor) -> None:
        for projection, raw, plain in (("q_proj", inputs.raw_q, inputs.q), ("k_proj", inputs.raw_k, inputs.k)):
            assert inputs.hidden is not None
            own = getattr(attention, projection)(inputs.hidden)
            expected = own.unflatten(-1, (plain.shape[1], -1)).transpose(1, 2)
            assert (raw is None) == (norm_of(attention, "q") is None)
            if raw is not None:
                assert torch.equal(raw, expected)
                assert not torch.allclose(plain[:, :, 0], expected[:, :, 0])  # the norm does something
        seen.append(target)

    with mode(model, "observe"), observed(model, observer):
        model(IDS)
    assert len(seen) == len(attentions(model))
    assert forgets(model)


@torch.no_grad()
def test_calls_padding_and_packing(model: Any) -> None:
    expected = model(IDS).logits
    cache, parts = None, []
    for piece in IDS.split([5, 1, 1, 9, 3], dim=1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    assert_close(torch.cat(parts, 1), expected, FP64, "in pieces")
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :5], mask[1, 7:12] = 0, 0
    frame = torch.full_like(mask, 7)
    frame[mask.bool()] = IDS.flatten()
    assert_close(model(frame, attention_mask=mask).logits[mask.bool()].view_as(expected), expected, FP64, "padded")
    packed, position = IDS.view(1, -1), torch.arange(19).repeat(2)[None]
    assert_close(model(packed, position_ids=position).logits.view_as(expected), expected, FP64, "packed")


@torch.no_grad()
def test_the_teacher_records_nothing_and_copies_are_models(model: Any) -> None:
    with mode(model, "teacher"):
        teacher = model(IDS).logits
    assert forgets(model)
    expected = model(IDS).logits
    assert not torch.allclose(teacher, expected)
    assert forgets(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS).logits, expected)


def test_gradients_reach_the_projections(model: Any) -> None:
    model.train()
    model(IDS).logits.sum().backward()
    first = attentions(model)[0]
    assert float(first.q_proj.weight.grad.abs().sum()) > 0
    for norm in filter(None, [norm_of(first, "q")]):  # nothing reads what it gives
        assert all(p.grad is None for p in norm.parameters())
    assert forgets(model)
