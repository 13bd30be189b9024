"""Our engines, with and without kernels of their own, give what fla's plain references give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, logsigmoid, normalize

from linearize.methods.based_linear import BasedLinear
from linearize.methods.rebased import Rebased
from linearize.modeling import recurrence_additive, recurrence_delta, recurrence_slots
from linearize.modeling.mixer import Mixer
from linearize.testing.laws import assert_close
from linearize.testing.models import random_inputs, tiny_shape

TIME, K, V = 70, 6, 5
EXACT = 1e-5
Pair = tuple[Tensor, Tensor]


def streams() -> dict[str, Tensor]:
    """In fla's layout: q, k, unit keys, decays (1, T, 2, K), v (1, T, 2, V), beta and head decays (1, T, 2), state (1, 2, K, V)."""
    k = torch.randn(1, TIME, 2, K)
    return {
        "q": torch.randn(1, TIME, 2, K),
        "k": k,
        "unit": normalize(k, dim=-1),
        "v": torch.randn(1, TIME, 2, V),
        "beta": torch.rand(1, TIME, 2),
        "head": logsigmoid(torch.randn(1, TIME, 2)),
        "channel": logsigmoid(torch.randn(1, TIME, 2, K)),
        "state": torch.randn(1, 2, K, V),
    }


def ours(x: Tensor) -> Tensor:
    """(1, T, M, .) as (1, M, T, .)."""
    return x.transpose(1, 2)


def check(found: Pair, expected: Tensor, last: Tensor | None) -> None:
    """Ours (1, M, 1, T, V) against (1, T, M, V)."""
    assert_close(found[0][:, :, 0], ours(expected), EXACT, "outputs")
    if last is not None:
        assert_close(found[1], last, EXACT, "state")


def additive(s: dict[str, Tensor], k: Tensor, g: Tensor | None) -> Pair:
    return recurrence_additive.chunked(ours(s["q"])[:, :, None], ours(k), ours(s["v"]), None if g is None else ours(g), s["state"])


def delta(s: dict[str, Tensor], g: Tensor | None) -> Pair:
    r = s["unit"] if g is None else s["unit"] * (g if g.dim() == 4 else g[..., None]).exp()
    key, g = s["unit"] * s["beta"][..., None], None if g is None else ours(g)
    return recurrence_delta.chunked(ours(s["q"])[:, :, None], ours(r), None, ours(key), ours(s["v"]), g, s["state"])


def test_linear_attention() -> None:
    from fla.ops.linear_attn.naive import naive_recurrent_linear_attn

    s = streams()
    expected = naive_recurrent_linear_attn(s["q"], s["k"], s["v"], 1.0, s["state"], output_final_state=True)
    check(additive(s, s["k"], None), *expected)


def test_simple_gla() -> None:
    from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

    s = streams()
    check(additive(s, s["k"], s["head"]), *naive_recurrent_simple_gla(s["q"], s["k"], s["v"], s["head"], 1.0, s["state"]))


@pytest.mark.parametrize("name", ["gla", "hgrn2"])
def test_gla(name: str) -> None:
    """HGRN2 is GLA whose key is 1 - decay."""
    from fla.ops.gla.naive import naive_recurrent_gla

    s = streams()
    k = s["k"] if name == "gla" else -torch.expm1(s["channel"])
    expected = naive_recurrent_gla(s["q"] * K**0.5, k, s["v"], s["channel"], s["state"], output_final_state=True)
    check(additive(s, k, s["channel"]), *expected)


def test_deltanet() -> None:
    from fla.ops.delta_rule.naive import delta_rule_recurrence

    s = streams()
    q, k, v, beta = (ours(s[name]) for name in ("q", "unit", "v", "beta"))
    out, last = delta_rule_recurrence(q * K**0.5, k, v, beta, s["state"])
    check(delta(s, None), ours(out), last)


def test_gated_deltanet() -> None:
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

    s = streams()
    given = [s[name] for name in ("q", "unit", "v", "beta", "head")]
    check(delta(s, s["head"]), *naive_recurrent_gated_delta_rule(*given, 1.0, s["state"], output_final_state=True))


def test_kda() -> None:
    from fla.ops.kda.naive import naive_recurrent_kda

    s = streams()
    given = [s[name] for name in ("q", "unit", "v", "channel", "beta")]
    check(delta(s, s["channel"]), *naive_recurrent_kda(*given, 1.0, s["state"], output_final_state=True))


def test_gated_deltaproduct() -> None:
    from fla.ops.gated_delta_product.naive import naive_recurrent_gated_delta_product

    s, n = streams(), 2
    q, g = s["q"][:, : TIME // n], s["head"][:, : TIME // n]
    given = [s[name] for name in ("unit", "v")]
    expected = naive_recurrent_gated_delta_product(q, *given, g, s["beta"], 1.0, None, s["state"], True, n)
    decays = torch.stack([g, torch.zeros_like(g)], dim=2).flatten(1, 2)  # only before the first of a token's updates
    r, key = s["unit"] * decays[..., None].exp(), s["unit"] * s["beta"][..., None]
    found = recurrence_delta.chunked(
        ours(q)[:, :, None], ours(r), None, ours(key), ours(s["v"]), ours(decays), s["state"], deltas=n
    )
    check(found, *expected)


def test_rwkv7() -> None:
    """RWKV-7 is a decay of each channel and one of rank one: fla's reference is that of both at once."""
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence

    s, rate = streams(), torch.rand(1, TIME, 2, K)
    q, k, v, r, a, g = (ours(x) for x in (s["q"], s["k"], s["v"], s["unit"], -rate * s["unit"], s["channel"]))
    out, last = dplr_recurrence(q * K**0.5, k, v, r, a, g, s["state"])
    check(recurrence_delta.chunked(q[:, :, None], r, a, k, v, g, s["state"]), ours(out), last)


def test_gated_slots() -> None:
    from fla.ops.gsa.naive import naive_recurrent_gsa

    s, slots = streams(), 4
    g = logsigmoid(torch.randn(1, TIME, 2, slots))
    keys, values = torch.randn(1, 2, K, slots), torch.randn(1, 2, slots, V)
    writes = -torch.expm1(g)
    out, last = naive_recurrent_gsa(s["q"], s["k"], s["v"], writes, g, 1.0, (keys, values), output_final_state=True)
    state = torch.cat([keys.transpose(-1, -2), values], dim=-1)
    q, k, v, writes, g = (ours(x) for x in (s["q"], s["k"], s["v"], writes, g))
    found = recurrence_slots.chunked(q[:, :, None], k, v, writes, g, state)
    check(found, out, torch.cat([last[0].transpose(-1, -2), last[1]], dim=-1))


def test_abc() -> None:
    """ABC is gated slots with writes e^s / z_t and decays z_{t-1} / z_t, where z_t is the sum of e^s so far."""
    from fla.ops.abc.naive import naive_cumsum_abc

    s, slots = streams(), 4
    q, k, v = (ours(s[name]) for name in ("q", "k", "v"))
    logits = torch.randn(1, 2, TIME, slots)
    z = logits.logcumsumexp(2)
    decays = torch.cat([z[:, :, :1], z[:, :, :-1]], dim=2) - z
    out, _ = naive_cumsum_abc(q * K**0.5, k, v, logits)
    found = recurrence_slots.chunked(q[:, :, None], k, v, (logits - z).exp(), decays, torch.zeros(1, 2, slots, K + V))
    check(found, ours(out), None)


@pytest.mark.parametrize("method", [BasedLinear, Rebased])
def test_quadratic_maps(method: type[BasedLinear] | type[Rebased]) -> None:
    """Mixers whose learned projection is the identity, on tokens without RoPE."""
    from fla.ops.based.naive import naive_parallel_based
    from fla.ops.rebased.naive import naive_parallel_rebased

    shape = tiny_shape(4)
    inputs = random_inputs(shape, TIME, 1, torch.float32)
    inputs.cos.fill_(1)
    inputs.sin.fill_(0)
    with torch.no_grad():
        found = Mixer(method(feature_dim=shape.head_dim).mixer(), shape)(inputs)[0]
    if method is BasedLinear:
        expected = naive_parallel_based(inputs.q, inputs.k, inputs.v)
    else:
        q, k = (layer_norm(x, x.shape[-1:]) for x in (inputs.q, inputs.k))
        expected = naive_parallel_rebased(q, k, inputs.v)
    assert_close(found, ours(expected), EXACT, "outputs")
