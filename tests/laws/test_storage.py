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
    x = torch.randn(500, channels, dtype=dtype) * torch.logspace(-6, 4, 500, dtype=dtype)[:, None]
    x[3] = 0
    x[4, 1:] = 0
    x[5:20] += 1000 * torch.arange(15)[:, None]  # all near to one another beside their size
    x[20] = 0.1
    once = rounded(x, stored)
    assert torch.equal(opened(kept(x, stored), dtype), once)
    assert torch.equal(kept(once, stored), kept(x, stored))
    assert torch.equal(rounded(once, stored), once)
    size, reach = x.abs().amax(-1, keepdim=True), x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)
    step = size / 127 if stored == EIGHT else reach / 15
    assert ((once - x).abs() <= 0.5 * step + size * 2**-8).all()


def test_four_bits_have_bounds_for_each_32_channels() -> None:
    x = torch.cat([torch.randn(7, 32), 1000 * torch.randn(7, 32)], dim=-1)
    assert kept(x, FOUR).shape == (7, int4_width(64)) == (7, 32 + 8)
    assert ((rounded(x, FOUR) - x)[:, :32].abs() < 0.25).all()


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
