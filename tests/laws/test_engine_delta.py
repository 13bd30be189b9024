"""Law 1 for the delta engine: reference == chunked at any chunk == folded steps, with gradients; and published recurrences."""

from __future__ import annotations

import itertools

import pytest
import torch
from forms import STRENGTHS, compare, with_gradients
from torch import Tensor
from torch.nn.functional import normalize

from linearize.modeling.recurrence_delta import chunked, reference, step
from linearize.testing.laws import EXACT, assert_close

CHUNKS = (0, 1, 6)
LENGTHS = (1, 2, 3, 5, 9, 13, 37)
DECAYS = [("none", "weak"), *itertools.product(("head", "channel"), ("weak", "mixed", "strong"))]
KINDS = {
    "tied": (True, 1, 1.0),
    "reflecting pairs": (True, 2, 2.0),
    "reflecting untied": (False, 1, 2.0),
    "untied pairs": (False, 2, 1.0),
}
PAIRS = [(kind, torch.float64) for kind in KINDS] + [(kind, torch.float32) for kind in KINDS if "reflecting" in kind]
Stream = dict[str, Tensor | None]


def random_stream(
    time: int, decay: str, lowest: float, dtype: torch.dtype, tied: bool = True, deltas: int = 1, top: float = 1.0
) -> Stream:
    """q (2, 3, 2, T, 5); unit keys h with strengths up to `top`; log-decays in [lowest, 0] if any; a state that is not empty.

    Tied it is Gated DeltaNet, r = e^g h; untied k is of its own, and r = h as in RWKV-7 where strengths stay below 1.
    """
    updates = time * deltas
    h, strength = normalize(torch.randn(2, 3, updates, 5, dtype=dtype), dim=-1), top * torch.rand(2, 3, updates, 1, dtype=dtype)
    sizes = {"none": None, "head": (updates,), "channel": (updates, 5)}[decay]
    g = None if sizes is None else lowest * torch.rand(2, 3, *sizes, dtype=dtype)
    alpha = 1.0 if g is None or not (tied or top > 1) else (g[..., None] if g.dim() == 3 else g).exp()
    return {
        "q": torch.randn(2, 3, 2, time, 5, dtype=dtype),
        "r": alpha * h,
        "a": None if tied else -strength * h,
        "k": strength * h if tied else torch.randn(2, 3, updates, 5, dtype=dtype),
        "v": torch.randn(2, 3, updates, 4, dtype=dtype),
        "g": g,
        "state": torch.randn(2, 3, 5, 4, dtype=dtype),
    }


def part(stream: Stream, start: int, stop: int, deltas: int) -> Stream:
    """Tokens start to stop, without the state."""
    cut = {name: x if x is None else x[:, :, start * deltas : stop * deltas] for name, x in stream.items() if name in "rakvg"}
    return {**cut, "q": stream["q"][..., start:stop, :]}


def folded(deltas: int = 1, **stream: Tensor | None) -> tuple[Tensor, Tensor]:
    outputs, state = [], stream["state"]
    for t in range(stream["q"].shape[-2]):
        token = part(stream, t, t + 1, deltas)
        out, state = step(**{**token, "q": token["q"][..., 0, :]}, state=state)
        outputs.append(out)
    return torch.stack(outputs, -2), state


def evaluate(form, stream: Stream, **options: int) -> dict[str, Tensor]:
    """Outputs, final state, and the gradients of a sum of both."""
    leaves = {name: x.clone().requires_grad_() for name, x in stream.items() if x is not None}
    return with_gradients(form(**{**stream, **leaves}, **options), leaves)


@pytest.mark.parametrize(("decay", "strength"), DECAYS)
@pytest.mark.parametrize(("kind", "dtype"), PAIRS, ids=str)
def test_forms_agree(kind: str, decay: str, strength: str, dtype: torch.dtype) -> None:
    deltas = KINDS[kind][1]
    for time in LENGTHS:
        stream = random_stream(time, decay, STRENGTHS[strength], dtype, *KINDS[kind])
        expected = evaluate(reference, stream, deltas=deltas)
        if dtype == torch.float64:
            compare(evaluate(folded, stream, deltas=deltas), expected, f"{time} steps")
        for chunk in CHUNKS:
            compare(evaluate(chunked, stream, deltas=deltas, chunk=chunk), expected, f"{time} tokens in chunks of {chunk}")


@pytest.mark.parametrize(("decay", "strength"), DECAYS)
@pytest.mark.parametrize(("kind", "dtype"), PAIRS[-3:], ids=str)
def test_long_streams_agree(kind: str, decay: str, strength: str, dtype: torch.dtype) -> None:
    """Several whole chunks, where cumulative log-decays and the inverse are largest."""
    stream, deltas = random_stream(211, decay, STRENGTHS[strength], dtype, *KINDS[kind]), KINDS[kind][1]
    compare(evaluate(chunked, stream, deltas=deltas), evaluate(reference, stream, deltas=deltas), "211 tokens")


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize("kind", KINDS)
def test_terraced_forms_agree(kind: str, decay: str) -> None:
    """Blocks enter whole before their queries read; the same through calls of one block each."""
    deltas = KINDS[kind][1]
    for time, block in itertools.product(LENGTHS, (1, 4)):
        dtype = torch.float32 if time in (3, 13) else torch.float64
        stream = random_stream(time, decay, -2.0, dtype, *KINDS[kind])
        expected = evaluate(reference, stream, terraced=block, deltas=deltas)
        compare(evaluate(chunked, stream, terraced=block, deltas=deltas), expected, f"{time} tokens in blocks of {block}")
        outputs, state = [], stream["state"]
        for at in range(0, time, block):
            out, state = chunked(**part(stream, at, at + block, deltas), state=state, terraced=block, deltas=deltas)
            outputs.append(out)
        compare({"output": torch.cat(outputs, -2), "state": state}, expected, f"{time} tokens, a call for each block of {block}")


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
def test_tied_is_untied(decay: str) -> None:
    stream = random_stream(70, decay, -2.0, torch.float64, deltas=2, top=2.0)
    for form in (reference, chunked):
        found, state = form(**{**stream, "a": -stream["k"]}, deltas=2)
        expected, last = form(**stream, deltas=2)
        compare({"output": found, "state": state}, {"output": expected, "state": last}, form.__name__)


def test_exponents_never_overflow() -> None:
    """However strong the decay, nothing is clamped and nothing overflows, in fp32 too."""
    for decay, kind in itertools.product(("head", "channel"), KINDS.values()):
        stream = random_stream(130, decay, -1e4, torch.float32, *kind)
        compare(evaluate(chunked, stream, deltas=kind[1]), evaluate(reference, stream, deltas=kind[1]), f"{decay}, {kind}")


@pytest.mark.parametrize("kept", [[], [0, 3, 4, 17, 39], list(range(25))], ids=["none", "some", "first"])
@pytest.mark.parametrize("tied", [True, False])
def test_pads_change_nothing(tied: bool, kept: list[int]) -> None:
    """Updates of zeros, alone or among others."""
    for decay in ("none", "head", "channel"):
        stream = random_stream(40, decay, -2.0, torch.float64, tied)
        masked, short = dict(stream), {**stream, "q": stream["q"][..., kept, :]}
        for name in "rakvg":
            if (x := stream[name]) is not None:
                masked[name] = torch.zeros_like(x).index_copy(2, torch.tensor(kept, dtype=torch.long), x[:, :, kept])
                short[name] = x[:, :, kept]
        _, state = chunked(**masked, chunk=16)
        if kept:
            assert_close(state, reference(**short)[1], EXACT[state.dtype], decay)
        else:
            assert torch.equal(state, stream["state"])


@pytest.mark.parametrize("keys", ["the same", "two in turn", "nearly the same"])
def test_solve_keeps_precision(keys: str) -> None:
    """Keys that repeat give the largest off-diagonals of the system that a chunk solves."""
    stream = random_stream(200, "head", -0.01, torch.float32, top=2.0)
    h = normalize(torch.randn(2, 3, 2, 5), dim=-1)[:, :, torch.arange(200) % (2 if keys == "two in turn" else 1)]
    h = normalize(h + 0.05 * torch.randn(h.shape), dim=-1) if keys == "nearly the same" else h
    strength = 1 + torch.rand(2, 3, 200, 1)
    stream |= {"r": stream["g"][..., None].exp() * h, "k": strength * h}
    compare(evaluate(chunked, stream), evaluate(reference, stream), keys)


# ---- published recurrences, as written there: the state is V x K ----


def naive(transition, written: Tensor, q: Tensor, state: Tensor, deltas: int = 1) -> tuple[Tensor, Tensor]:
    """S_t = S_{t-1} transition_t + written_t, o_t = S_t q_t after every `deltas`."""
    outputs, state = [], state.transpose(-1, -2)
    for t in range(written.shape[2]):
        state = state @ transition[:, :, t] + written[:, :, t]
        if t % deltas == deltas - 1:
            outputs.append(torch.einsum("bmvk,bmrk->bmrv", state, q[..., t // deltas, :]))
    return torch.stack(outputs, -2), state.transpose(-1, -2)


@pytest.mark.parametrize("method", ["DeltaNet", "Gated DeltaNet", "KDA", "DeltaProduct", "RWKV-7"])
def test_is_the_published_recurrence(method: str) -> None:
    time, n = 75, 2 if method == "DeltaProduct" else 1
    q, v = torch.randn(2, 3, 2, time, 5).double(), torch.randn(2, 3, time * n, 4).double()
    h, beta = normalize(torch.randn(2, 3, time * n, 5).double(), dim=-1), 2 * torch.rand(2, 3, time * n, 1).double()
    state, eye = torch.randn(2, 3, 5, 4).double(), torch.eye(5).double()
    householder = eye - beta[..., None] * h[..., None] * h[..., None, :]
    if method == "RWKV-7":  # S (Diag(w) - h^T (rate * h)) + v k
        w, rate, key = torch.rand(2, 3, time, 5).double(), torch.rand(2, 3, time, 5).double(), torch.randn(2, 3, time, 5).double()
        transition = torch.diag_embed(w) - h[..., :, None] * (rate * h)[..., None, :]
        expected = naive(transition, v[..., :, None] * key[..., None, :], q, state)
        r, a, k, g = h, -rate * h, key, w.log()
    else:
        alpha = {"Gated DeltaNet": torch.rand(2, 3, time), "KDA": torch.rand(2, 3, time, 5)}.get(method, torch.ones(2, 3, time * n))
        if method == "DeltaProduct":  # the decay is applied once a token
            alpha[:, :, ::n] = torch.rand(2, 3, time)
        alpha = alpha.double()
        wide = alpha if alpha.dim() == 4 else alpha[..., None]
        expected = naive(wide[..., :, None] * householder, v[..., :, None] * (beta * h)[..., None, :], q, state, n)
        r, a, k, g = wide * h, None, beta * h, None if method == "DeltaNet" else alpha.log()
    for form in (reference, chunked):
        out, last = form(q, r, a, k, v, g, state, deltas=n)
        compare({"output": out, "state": last}, {"output": expected[0], "state": expected[1]}, f"{method}, {form.__name__}")
