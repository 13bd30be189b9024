"""What a state keeps in 8 or 4 bits is what the mixer computes with, to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from linearize.modeling.memory import empty_state
from linearize.modeling.mixer import Mixer
from linearize.modeling.spec import MixerSpec, Shape, int4_width
from linearize.modeling.storage import EIGHT, FOUR, kept, opened, rounded
from linearize.testing.models import tiny_shape


@pytest.mark.parametrize("channels", [64, 40, 2])
@pytest.mark.parametrize("stored", [EIGHT, FOUR])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rounded_values_are_stored_without_loss(dtype: torch.dtype, stored: torch.dtype, channels: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(500, channels, dtype=dtype) * torch.logspace(-3, 4, 500, dtype=dtype)[:, None]
    x[3] = 0
    x[4, 1:] = 0
    x[5:20] += 1000 * torch.arange(15)[:, None]  # all near to one another beside their size
    x[20] = 0.1
    once = rounded(x, stored)
    assert torch.equal(opened(kept(x, stored), dtype), once)
    assert torch.equal(kept(once, stored), kept(x, stored))
    assert torch.equal(rounded(once, stored), once)
    least, greatest, size = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), x.abs().amax(-1, keepdim=True)
    span, twice = greatest - least, (greatest + least).abs()
    wide = 0.8 * span / 15 + torch.where(twice < 4 * span, 0.0, size / 37) + 2**-14  # 3 bits; far from zero; the least scale
    bound = size * (0.5 / 127 + 2**-8) if stored == EIGHT else wide
    assert ((once - x).abs() <= bound).all()


def test_four_bits_have_a_scale_for_each_32_channels() -> None:
    x = torch.cat([torch.randn(7, 32), 1000 * torch.randn(7, 32)], dim=-1)
    assert kept(x, FOUR).shape == (7, int4_width(64)) == (7, 32 + 4)
    assert ((rounded(x, FOUR) - x)[:, :32].abs() < 0.25).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_blocks_far_from_zero_beside_their_span_are_stored_without_loss(dtype: torch.dtype) -> None:
    """Middles up to where an offset ends and beyond, at every mantissa of a scale; spans down to none."""
    torch.manual_seed(0)
    scale, middle = torch.arange(8, 16)[:, None, None, None] / 8, torch.arange(-130, 130, 0.125)[:, None, None]
    spread = torch.tensor([7.5, 3.0, 0.4, 0.0])[:, None] * torch.cat([-torch.ones(1), 2 * torch.rand(30) - 1, torch.ones(1)])
    x = (scale * (middle / 2 + spread)).to(dtype)
    once = kept(x, FOUR)
    assert torch.equal(kept(opened(once, dtype), FOUR), once)
    assert ((opened(once, dtype) - x).abs() <= 0.75 * 2 * scale).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scales_end_somewhere(dtype: torch.dtype) -> None:
    """Too small is nothing, too large the largest, what is not finite not a number."""
    x = torch.randn(4, 32, dtype=dtype)
    x[0], x[1], x[2, 3], x[3, 4] = 1e-9 * x[0], 1e7 * x[1].sign(), torch.inf, torch.nan
    found = opened(kept(x, FOUR), dtype)
    assert (found[0] == 0).all()
    assert torch.equal(kept(found[:2], FOUR)[1], kept(x, FOUR)[1])
    assert found[1].unique().numel() == 2
    assert found[2:].isnan().all()


@pytest.mark.parametrize("stored", [EIGHT, FOUR])
def test_the_gradient_passes_straight_through(stored: torch.dtype) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    rounded(x, stored).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(3, 8))


def test_heads_of_an_odd_width_are_refused() -> None:
    spec = MixerSpec(merge="near", feature_map="identity", share_kv=True, window=8, slots=5, slot_dtype="int4")
    with pytest.raises(ValueError, match="two channels in a byte"):
        Mixer(spec, Shape(hidden_size=12, heads=2, kv_heads=1, head_dim=6, value_dim=5))


@pytest.mark.parametrize("slot_dtype", ["kv", "int4"])
def test_bytes_are_as_the_spec_counts_them(slot_dtype: str) -> None:
    spec = MixerSpec(
        merge="near", feature_map="identity", share_kv=True, window=8, sinks=2, slots=5, more_slots=3, more_heads=(1,),
        kv_dtype="int8", slot_dtype=slot_dtype,
    )  # fmt: skip
    state = empty_state(spec, tiny_shape(), 1, torch.float32, torch.device("cpu"))
    assert sum(x.numel() * x.element_size() for x in state.values()) == spec.state_bytes(tiny_shape())
    assert spec.state_bytes(tiny_shape()) < 0.4 * replace(spec, kv_dtype="model", slot_dtype="kv").state_bytes(tiny_shape())
