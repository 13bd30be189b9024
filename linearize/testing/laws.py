"""The laws that every mixer obeys, as functions of a spec: each makes a random mixer and fails with an AssertionError."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from itertools import pairwise
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from linearize.modeling.memory import State
from linearize.modeling.mixer import Mixer
from linearize.modeling.spec import MixerSpec, Shape
from linearize.modeling.stream import Inputs
from linearize.testing.models import random_inputs, random_mixer, randomise, tiny_shape
from linearize.testing.oracle import Document, oracle

EXACT = {torch.float64: 1e-9, torch.float32: 1e-5}
TIME = 14
BY_HEAD = ("q", "k", "v", "raw_q", "raw_k")
LEAVES = (*BY_HEAD, "hidden")
STREAMS = (*LEAVES, "cos", "sin")


def deviation(found: Tensor, expected: Tensor) -> float:
    """Relative RMSE; absolute where nothing but zeros, or their rounding, is expected."""
    size = float(expected.detach().where(expected.isfinite(), 0.0).norm())  # an empty slot's score is -inf
    gap = (found - expected).where(found != expected, 0.0)
    return float(gap.norm()) / (size if size > 1e-12 else 1.0)


def assert_close(found: Tensor, expected: Tensor, bound: float, what: str) -> None:
    error = deviation(found, expected)
    assert error <= bound, f"{what}: relative error {error:.1e} above {bound:.0e}"


def carried(spec: MixerSpec, dtype: torch.dtype = torch.float64) -> float:
    """Bound where the state passes from call to call: in bf16 four units of its last place, each dithered rounding up to one."""
    return 4 * 2.0**-7 if spec.state_dtype == "bfloat16" else EXACT[dtype]


def part(inputs: Inputs, start: int, stop: int) -> Inputs:
    """The call for tokens start to stop alone."""
    names = (*STREAMS, "mask", "segments")
    pieces = {name: getattr(inputs, name) for name in names if getattr(inputs, name) is not None}
    cut: dict[str, Any] = {name: x.narrow(2 if name in BY_HEAD else 1, start, stop - start) for name, x in pieces.items()}
    return replace(inputs, **cut)


def run(mixer: Mixer, inputs: Inputs, sizes: Sequence[int], state: State | None = None) -> tuple[Tensor, State]:
    """Calls of `sizes` tokens, the last for all that remain, with the state carried: outputs (B, T, H, V) and the last state."""
    time, start, outputs = inputs.q.shape[2], 0, []
    for size in [*sizes, time]:
        stop = min(start + size, time)
        if stop > start:
            out, state = mixer(part(inputs, start, stop), state, keep=True)
            outputs.append(out)
        start = stop
    assert state is not None
    return torch.cat(outputs, 1), state


def index_rows(state: State, rows: Tensor) -> State:
    return {name: x.index_select(0, rows) for name, x in state.items()}


def _setting(spec: MixerSpec, kv_heads: int, time: int = TIME, batch: int = 2) -> tuple[Mixer, Inputs]:
    return random_mixer(spec, kv_heads), random_inputs(tiny_shape(kv_heads), time, batch)


def of_a_state(law: Callable[[MixerSpec, int], None]) -> Callable[[MixerSpec, int], None]:
    """A law that says nothing of bidirectional mixers: they read whole texts and have no state."""

    @wraps(law)
    def held(spec: MixerSpec, kv_heads: int) -> None:
        if spec.causal:
            law(spec, kv_heads)

    return held


# ---- 1: one meaning ----


def equations(spec: MixerSpec, kv_heads: int) -> None:
    """Parallel and token by token, the mixer is its equations: outputs, and gradients of inputs and parameters."""
    mixer, inputs = _setting(spec, kv_heads)
    expected = _gradients(mixer, inputs, lambda x: oracle(mixer, x))
    exact = EXACT[torch.float64]
    for name, value in _gradients(mixer, inputs, lambda x: mixer(x)[0]).items():
        assert_close(value, expected[name], exact, f"parallel, {name}")
    if not spec.causal:  # no token can be read before all have entered
        return
    stepped = _gradients(mixer, inputs, lambda x: run(mixer, x, [1] * TIME)[0])
    assert_close(stepped.pop("output"), expected["output"], carried(spec), "step by step")
    if spec.kv_dtype == "int8" or spec.slot_dtype == "int4":  # whole numbers carry no gradient from call to call
        return
    estimated = 2.0**-3 if spec.state_dtype == "bfloat16" else exact  # what passes straight through a rounding is an estimate
    for name, value in stepped.items():
        assert_close(value, expected[name], estimated, f"step by step, {name}")


def _gradients(mixer: Mixer, inputs: Inputs, way: Callable[[Inputs], Tensor]) -> dict[str, Tensor]:
    leaves = {name: getattr(inputs, name).clone().requires_grad_() for name in LEAVES}
    wanted = {**leaves, **dict(mixer.named_parameters())}
    out = way(replace(inputs, **leaves))
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).sin().view_as(out)
    found = torch.autograd.grad((out * weight).sum(), list(wanted.values()), allow_unused=True, materialize_grads=True)
    return {"output": out.detach(), **{f"gradient of {name}": x for name, x in zip(wanted, found, strict=True)}}


def lengths(spec: MixerSpec, kv_heads: int) -> None:
    """Every length about the window's, primes, and one longer than all chunks."""
    mixer, inputs = _setting(spec, kv_heads, 71, batch=1)
    window = spec.window
    for time in sorted({1, 2, 3, 7, 13, max(window - 1, 1), window + 1, 2 * window + 1, 71}):
        with torch.no_grad():
            own = inputs.first(time)
            assert_close(mixer(own)[0], oracle(mixer, own), EXACT[torch.float64], f"{time} tokens")


@torch.no_grad()
def precision(spec: MixerSpec, kv_heads: int) -> None:
    """fp32 inputs, and bf16 up to the rounding of the output, give what the equations give on these numbers, autocast or not."""
    for dtype, bound in ((torch.float32, EXACT[torch.float32]), (torch.bfloat16, 2.0**-8)):
        mixer, inputs = random_mixer(spec, kv_heads, torch.float32), random_inputs(tiny_shape(kv_heads), 37, 1, dtype)
        found = mixer(inputs)[0]
        wide = replace(inputs, **{name: getattr(inputs, name).double() for name in STREAMS})
        assert found.dtype == dtype
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(mixer(inputs)[0], found), "autocast reaches the mixer"
        assert_close(found.double(), oracle(mixer.double(), wide), bound, str(dtype))


# ---- 2: split ----


@of_a_state
@torch.no_grad()
def split(spec: MixerSpec, kv_heads: int) -> None:
    """Any two calls, and any several, are one call, in outputs and in the state that they leave."""
    mixer, inputs = _setting(spec, kv_heads)
    whole, state = run(mixer, inputs, [])
    for sizes in [*([s] for s in range(1, TIME)), [1, 5, 1, 1, 3], [4, 4], [7, 1, 1, 1]]:
        out, after = run(mixer, inputs, sizes)
        assert_close(out, whole, carried(spec), f"split at {sizes}")
        for name, x in after.items():
            assert_close(x.double(), state[name].double(), carried(spec), f"{name} after {sizes}")


# ---- 3 and 4: padding and packing ----

MASKS = {
    "left": ["000011111111111", "001111111111100"],
    "right": ["111111111110000", "110111111111100"],
    "interior": ["110001111110111", "101010111111111"],
    "holes at every step": ["010101110011111", "101011001101110"],
    "one row full": ["111111111111111", "000000000000001"],
}


@torch.no_grad()
def padding(spec: MixerSpec, kv_heads: int) -> None:
    """Rows with pads, whatever the pads hold, are the rows without, with and without a carried state."""
    for label, rows in MASKS.items():
        mask = torch.tensor([[int(x) for x in row] for row in rows])
        mixer, inputs = _setting(spec, kv_heads, mask.shape[1])
        inputs = replace(inputs, mask=mask)
        expected = torch.stack([_alone(mixer, inputs, row) for row in range(len(mask))])
        assert_close(mixer(inputs)[0], expected, EXACT[torch.float64], f"pads {label}")
        if not spec.causal:  # no state to carry
            continue
        for sizes in ([3, 4, 1, 5], [1] * mask.shape[1]) if label == "holes at every step" else ([3, 8],):
            assert_close(run(mixer, inputs, sizes)[0], expected, carried(spec), f"pads {label}, calls of {sizes}")


def _alone(mixer: Mixer, inputs: Inputs, row: int) -> Tensor:
    """One row (T, H, V) run with its real tokens only."""
    assert inputs.mask is not None
    at = inputs.mask[row].nonzero()[:, 0]
    pieces: dict[str, Any] = {name: getattr(inputs, name)[row : row + 1] for name in STREAMS}
    real = {name: x.index_select(2 if name in BY_HEAD else 1, at) for name, x in pieces.items()}
    out = inputs.q.new_zeros(inputs.q.shape[2], *inputs.q.shape[1:2], inputs.v.shape[-1])
    out[at] = mixer(replace(inputs, mask=None, **real))[0][0]
    return out


@torch.no_grad()
def packing(spec: MixerSpec, kv_heads: int) -> None:
    """Documents in one row are the same documents apart."""
    cuts = [0, 5, 6, 14, 23]
    mixer, inputs = _setting(spec, kv_heads, cuts[-1])
    number = torch.bucketize(torch.arange(cuts[-1]), torch.tensor(cuts[1:-1]), right=True)
    packed = mixer(replace(inputs, segments=number[None]))[0]
    apart = [mixer(part(inputs, a, b))[0] for a, b in pairwise(cuts)]
    assert_close(packed, torch.cat(apart, 1), EXACT[torch.float64], "packed documents")


# ---- 5: causality ----


@torch.no_grad()
def causality(spec: MixerSpec, kv_heads: int) -> None:
    """Another token j leaves every output before j as it was, to the bit, in fp64 and in fp32, and changes the one at j.

    In a bidirectional mixer it changes those before j too.
    """
    for dtype in (torch.float64, torch.float32):
        time = 40
        mixer, inputs = random_mixer(spec, kv_heads, dtype), random_inputs(tiny_shape(kv_heads), time, dtype=dtype)
        other, before = random_inputs(tiny_shape(kv_heads), time, dtype=dtype, seed=1), mixer(inputs)[0]
        for j in (1, 6, 17, 33, time - 1):
            changed = {name: getattr(inputs, name).clone() for name in LEAVES}
            for name, x in changed.items():
                at = (slice(None), j) if name == "hidden" else (slice(None), slice(None), j)
                x[at] = 30 * getattr(other, name)[at]
            after = mixer(replace(inputs, **changed))[0]
            assert torch.equal(after[:, :j], before[:, :j]) == spec.causal, f"token {j} and what came before it, {dtype}"
            assert not torch.equal(after[:, j], before[:, j]), f"token {j} changes nothing, {dtype}"


# ---- 6: handover ----


@of_a_state
@torch.no_grad()
def handover(spec: MixerSpec, kv_heads: int) -> None:
    """After t tokens each is exact or in the memory, once, and the memory is what the equations make of those that entered.

    Each value has a channel of its own, so that column j of an additive memory is all that token j left there.
    """
    if not spec.has_far:
        return
    shape = Shape(**{**vars(tiny_shape(kv_heads)), "value_dim": TIME})
    mixer, inputs = randomise(Mixer(spec, shape)).double(), random_inputs(shape, TIME, batch=1)
    lengths = torch.linspace(1, 2, TIME, dtype=torch.float64)  # all different, or recall errors tie and rounding decides
    inputs = replace(inputs, v=lengths.diag().expand(1, kv_heads, -1, -1))
    state: State | None = None
    for t in range(TIME):
        state = mixer(part(inputs, t, t + 1), state, keep=True)[1]
        document = Document(mixer, inputs.first(t + 1), 0, torch.arange(t + 1))
        document.simulate()
        for g, entered in enumerate(document.entered):
            exact = set(document.seen()[t].nonzero()[:, 0].tolist()) | set(document.exact[t][g]) if spec.has_near else set()
            if spec.coverage == "older":
                assert sorted([*entered, *exact]) == list(range(t + 1)), f"after {t}: {entered} in the memory, {exact} exact"
        expected = torch.stack([x for memory in document.memories for x in memory.rows()])
        assert_close(state["far"][0].double(), expected, carried(spec), f"memory after {t + 1} tokens")
        in_two = run(mixer, inputs.first(t + 1), [t // 2])[1]
        assert_close(in_two["far"].double(), state["far"].double(), carried(spec), f"memory after {t + 1} tokens in two calls")


# ---- 9: state ----


@of_a_state
@torch.no_grad()
def state_size(spec: MixerSpec, kv_heads: int) -> None:
    """As many bytes after one token as after many, as many as the spec says, and no larger tensor kept alive behind them."""
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        mixer, inputs = random_mixer(spec, kv_heads, torch.float32), random_inputs(tiny_shape(kv_heads), 72, 1, dtype)
        for sizes in ([72], [1], [2] * 3, [1] * 9, [69, 1, 2]):
            _, state = run(mixer, inputs.first(sum(sizes)), sizes)
            expected = spec.state_bytes(tiny_shape(kv_heads), size)
            assert sum(x.nbytes for x in state.values()) == expected, f"state after calls of {sizes}, {dtype}"
            for name, x in state.items():
                assert x.untyped_storage().nbytes() == x.nbytes, f"{name} keeps a larger tensor alive after calls of {sizes}"


@of_a_state
@torch.no_grad()
def state_keeping(spec: MixerSpec, kv_heads: int) -> None:
    """Saved and loaded, or forked, a state goes on to the bit as it would have; with rows picked anew, up to the order of sums."""
    mixer, inputs = _setting(spec, kv_heads, TIME + 5, batch=3)
    _, state = run(mixer, inputs.first(TIME), [])
    rest = part(inputs, TIME, TIME + 5)
    expected, _ = run(mixer, rest, [1, 1], state)
    assert torch.equal(run(mixer, rest, [1, 1], load(save(state)))[0], expected), "saved and loaded"
    run(mixer, replace(rest, k=-rest.k, v=-rest.v), [1, 1], state)  # a branch of its own
    assert torch.equal(run(mixer, rest, [1, 1], state)[0], expected), "forked"
    rows = torch.tensor([2, 0, 0])
    moved = replace(rest, **{name: getattr(rest, name)[rows] for name in STREAMS})
    picked, _ = run(mixer, moved, [1, 1], index_rows(state, rows))
    assert_close(picked, expected[rows], carried(spec), "rows picked anew")


LAWS: dict[str, Callable[[MixerSpec, int], None]] = {
    law.__name__: law
    for law in (equations, lengths, precision, split, padding, packing, causality, handover, state_size, state_keeping)
}
