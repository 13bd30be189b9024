"""What a state keeps in 8 bits is what the mixer computes with, to the bit."""

from __future__ import annotations

import pytest
import torch

from linearize.modeling.memory import empty_state
from linearize.modeling.spec import MixerSpec
from linearize.modeling.storage import kept, opened, rounded
from linearize.testing.models import tiny_shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rounded_values_are_stored_without_loss(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 64, dtype=dtype) * torch.logspace(-6, 4, 500, dtype=dtype)[:, None]
    x[3] = 0
    x[4, 5:] = 0
    once = rounded(x)
    assert torch.equal(opened(kept(x, torch.int8), dtype), once)
    assert torch.equal(rounded(once), once)
    assert ((once - x).abs() <= x.abs().amax(-1, keepdim=True) * (0.5 / 127 + 2**-8)).all()


def test_the_gradient_passes_straight_through() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    rounded(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(3, 8))


def test_bytes_are_as_the_spec_counts_them() -> None:
    spec = MixerSpec(merge="near", feature_map="identity", share_kv=True, window=8, sinks=2, slots=5, kv_dtype="int8")
    state = empty_state(spec, tiny_shape(), 1, torch.float32, torch.device("cpu"))
    assert sum(x.numel() * x.element_size() for x in state.values()) == spec.state_bytes(tiny_shape())
    assert spec.state_bytes(tiny_shape()) < 0.4 * MixerSpec(**{**spec.to_dict(), "kv_dtype": "model"}).state_bytes(tiny_shape())
