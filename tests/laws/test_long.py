"""Long texts and strong decays: 65,536 tokens in fp32 are what they are in fp64, for every engine, with nothing clamped."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from linearize.modeling.recurrence_additive import chunked as additive
from linearize.modeling.recurrence_complex import chunked as complex_decay
from linearize.modeling.recurrence_delta import chunked as delta
from linearize.modeling.recurrence_slots import chunked as slots
from linearize.testing.laws import assert_close

LONG, SIZE = 65_536, 4
STRONGEST = -20.0
BOUND = 1e-4  # of sums over tens of thousands of fp32 terms


def rows(*size: int) -> Tensor:
    return torch.randn(1, 1, *size, dtype=torch.float64)


def decays(width: int) -> Tensor:
    """Log-decays that forget within a token, within thousands, or hardly ever."""
    scale = torch.logspace(-5, 0, width, dtype=torch.float64)
    return STRONGEST * scale * torch.rand(1, 1, LONG, width, dtype=torch.float64)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def additive_inputs() -> list[Tensor]:
    return [rows(1, LONG, SIZE), rows(LONG, SIZE), rows(LONG, SIZE), decays(SIZE), rows(SIZE, SIZE)]


def complex_inputs() -> list[Tensor]:
    q, k, v, g, _ = additive_inputs()
    return [q, k, v, torch.cat([g, rows(LONG, SIZE)], -1), rows(2 * SIZE, SIZE)]


def slots_inputs() -> list[Tensor]:
    q, k, v, g, _ = additive_inputs()
    return [q, k, v, -torch.expm1(g), g, rows(SIZE, 2 * SIZE)]


def delta_inputs() -> list[Tensor]:
    q, k, v, g, state = additive_inputs()
    key, beta = unit(k), torch.rand(1, 1, LONG, 1, dtype=torch.float64)
    return [q, key * g.exp(), -beta * key, beta * key, v, g, state]


ENGINES = {
    "additive": (additive, additive_inputs),
    "complex": (complex_decay, complex_inputs),
    "slots": (slots, slots_inputs),
    "delta": (delta, delta_inputs),
}


@pytest.mark.parametrize(("form", "inputs"), ENGINES.values(), ids=ENGINES)
@torch.no_grad()
def test_long_text(form: Callable[..., tuple[Tensor, Tensor]], inputs: Callable[[], list[Tensor]]) -> None:
    torch.manual_seed(0)
    wide = inputs()
    expected, state = form(*wide)
    out, last = form(*(x.float() for x in wide))
    assert torch.isfinite(out).all()
    assert_close(out.double(), expected, BOUND, "outputs")
    assert_close(last.double(), state, BOUND, "state")
