"""Kernels for one token of a mixer like the default, and of windows with slots: outputs and states of steps are those of PyTorch in
float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from called_kernels import DEFAULT, both_halves, needs_kernels, recorded, widened

from linearize.modeling import native_operators, one_step
from linearize.modeling.memory import State
from linearize.modeling.mixer import Mixer
from linearize.modeling.spec import MixerSpec, Shape
from linearize.modeling.stream import Inputs
from linearize.modeling.window import Scores
from linearize.testing import random_inputs, randomise
from linearize.testing.laws import EXACT, deviation, part, run

pytestmark = needs_kernels
SHAPE = Shape(hidden_size=64, heads=4, kv_heads=2, head_dim=32, value_dim=16)
TIME = 150
CHECKS = ("test_schema", "test_faketensor")


@pytest.fixture(autouse=True)
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the kernel was given, call by call."""
    recorded(monkeypatch)
    calls: list[tuple[Any, ...]] = []
    step = one_step.mixer_step
    monkeypatch.setattr(one_step, "mixer_step", lambda *given: (calls.append(given), step(*given))[1])
    return calls


def both(spec: MixerSpec, shape: Shape = SHAPE) -> tuple[Mixer, Mixer]:
    """One mixer in float32 and in float64, with no parameter at its start."""
    mixer, other = (randomise(Mixer(spec, shape)) for _ in "ab")
    other.load_state_dict(mixer.state_dict())
    return mixer, other.double()


def tokens(time: int = TIME, dtype: torch.dtype = torch.float32, shape: Shape = SHAPE, **changes: Any) -> Inputs:
    return replace(random_inputs(shape, time, dtype=dtype, softcap=None), **changes)


def same_state(found: State, expected: State, exact: bool = True) -> None:
    """Numbers of a state by themselves; codes of 8 bits as they are, or one step apart."""
    assert found.keys() == expected.keys()
    for name, x in found.items():
        if x.dtype in (torch.int8, torch.int64):
            apart = (x.long() - expected[name].long()).abs()
            assert int(apart.max()) <= (0 if exact or name == "count" else 1), name
        else:
            assert deviation(x.double(), expected[name].double()) < (EXACT[torch.float32] if exact else 2.0**-7), name


@both_halves
def test_steps(changes: dict[str, Any], window: int, sinks: int, called: list[tuple[Any, ...]]) -> None:
    """From the second token on: while sinks fill up, before anything has left the window and afterwards; after a chunk too."""
    spec = replace(DEFAULT, window=window, sinks=sinks, **changes)
    mixer, other = both(spec)
    inputs = tokens()
    with torch.no_grad():
        for first in (1, 90):
            called.clear()
            sizes = [first] + [1] * (TIME - first)
            (found, state), (expected, last) = run(mixer, inputs, sizes), run(other, widened(inputs), sizes)
            assert len(called) == TIME - first
            assert deviation(found, expected) < 5e-5
            same_state(state, last)


@pytest.mark.parametrize("shape", [SHAPE, Shape(64, 6, 2, 20, 17), Shape(64, 10, 10, 16, 16)], ids=str)
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes(dtype: torch.dtype, state_dtype: str, shape: Shape, called: list[tuple[Any, ...]]) -> None:
    """A model's own dtype, a memory that is dithered to 16 bits, heads of any size: as PyTorch's steps on the same numbers."""
    mixer = both(replace(DEFAULT, state_dtype=state_dtype, feature_dim=32, far_rope=False), shape)[0]
    inputs, other = tokens(dtype=dtype, shape=shape), both(mixer.spec, shape)[0]
    other.by_kernel = lambda *_: None  # type: ignore[method-assign]
    sizes = [1] * TIME
    with torch.no_grad():
        (found, state), (expected, last) = run(mixer, inputs, sizes), run(other, inputs, sizes)
    assert len(called) == TIME - 1
    assert found.dtype == dtype
    rounded = dtype == torch.bfloat16 or state_dtype == "bfloat16"
    assert deviation(found.double(), expected.double()) < (2.0**-7 if rounded else EXACT[torch.float32])
    same_state(state, last, exact=state_dtype == "float32")


def test_a_memory_in_16_bits() -> None:
    """Dithered by the same bits as PyTorch's: but where sums differ in their last ones."""
    mixer, other = (both(replace(DEFAULT, state_dtype="bfloat16", window=16))[0] for _ in "ab")
    other.by_kernel = lambda *_: None  # type: ignore[method-assign]
    inputs = tokens(100)
    with torch.no_grad():
        state = mixer(part(inputs, 0, 99), keep=True)[1]
        found, expected = (m(part(inputs, 99, 100), state, keep=True)[1] for m in (mixer, other))
    assert found is not None
    assert expected is not None
    assert found["far"].dtype == torch.bfloat16
    assert (found["far"] != expected["far"]).double().mean() < 1e-2


@pytest.mark.parametrize("style", ["half", "split", "interleaved", "paired", "none"])
@pytest.mark.parametrize("far_norm", [True, False])
@pytest.mark.parametrize("texts", [1, 2])
def test_rotations(texts: int, far_norm: bool, style: str, called: list[tuple[Any, ...]]) -> None:
    """Undone by the kernel where channels are paired as halves, all of them or some; before it elsewhere."""
    mixer, other = both(replace(DEFAULT, far_rope=False, far_norm=far_norm))
    inputs = tokens(rope=style)
    assert inputs.cos is not None
    assert inputs.sin is not None
    for width in (32, 16):
        width = width // 2 if style == "split" else width
        cos, sin = (torch.stack([x[0], x[0].roll(7, 0)])[:texts, :, :width] for x in (inputs.cos, inputs.sin))
        own = replace(inputs, cos=cos, sin=sin)
        with torch.no_grad():
            found, state = run(mixer, own, [1] * 40)
            expected, last = run(other, widened(own), [1] * 40)
        assert deviation(found, expected) < 5e-5
        same_state(state, last)
        assert (called[-1][2][0] is not None) == (far_norm and style == "half" and width == 32)


def test_an_empty_memory_weighs_nothing() -> None:
    """However much a full one would."""
    mixer, other = both(DEFAULT)
    for own in (mixer, other):
        assert own.far_mass is not None
        own.far_mass.bias.data.fill_(1e4)
    inputs = tokens(20)
    with torch.no_grad():
        found, expected = run(mixer, inputs, [1] * 20)[0], run(other, widened(inputs), [1] * 20)[0]
    assert deviation(found, expected) < 5e-5


def test_rows_that_have_seen_other_numbers_of_tokens(called: list[tuple[Any, ...]]) -> None:
    mixer, other = both(replace(DEFAULT, window=16))
    inputs = tokens(60)
    first = replace(part(inputs, 0, 40), mask=torch.arange(40) >= torch.tensor([[0], [38]]))
    with torch.no_grad():
        states = [m(x, keep=True)[1] for m, x in ((mixer, first), (other, replace(widened(first), mask=first.mask)))]
        (found, state), (expected, last) = (
            run(m, x, [1] * 20, own)
            for m, x, own in ((mixer, part(inputs, 40, 60), states[0]), (other, widened(part(inputs, 40, 60)), states[1]))
        )
    assert len(called) == 20
    assert deviation(found, expected) < 5e-5
    same_state(state, last)


def checked(call: tuple[Any, ...]) -> None:
    """What a trace is told of the operator is so."""
    near, far, rotation, hidden, count, held, (maps, terms, learned, more_of), *rest = call
    given = (*near, *far, *rotation, hidden, count, *held, *maps, *terms, *learned, more_of, *rest)
    plain = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in given)
    torch.library.opcheck(native_operators._made("mixer_step"), plain, test_utils=CHECKS)


def test_what_pytorch_does(called: list[tuple[Any, ...]]) -> None:
    """Softcaps, learned sinks, halves that are left out, float16, gradients, and mixers that are not like the default."""
    inputs = tokens(10)
    scores = [Scores(0.2, 4.0), Scores(0.2, null=torch.zeros(4))]
    with torch.no_grad():
        mixer = both(DEFAULT)[0]
        for score in scores:
            run(mixer, replace(inputs, score=score), [1] * 10)
        for half in ("far", "near"):
            mixer.ablate = half
            run(mixer, inputs, [1] * 10)
        for kv_dtype in ("model", "int8"):
            run(both(replace(DEFAULT, kv_dtype=kv_dtype))[0], tokens(10, dtype=torch.float16), [1] * 10)
        others: list[dict[str, Any]] = [{"slots": 4, "slot_score": "norm"}, {"decay": "head"}, {"window_kind": "terraced"}]
        for changes in others:
            run(both(replace(DEFAULT, **changes))[0], inputs, [1] * 10)
    run(both(DEFAULT)[0], inputs, [1] * 10)
    assert not called


# ---- windows with slots ----

WINDOW = replace(DEFAULT.near_only(), window=8, sinks=2)
BEHIND = replace(DEFAULT, window=8, sinks=2)
SLOTS: list[dict[str, Any]] = [
    {"slots": 5},
    {"slots": 5, "slot_score": "learned"},
    {"slots": 5, "slot_score": "learned", "more_slots": 7, "more_heads": (1,)},
    {"slots": 1, "slot_score": "learned", "more_slots": 3, "more_heads": (0, 1)},
    {"slots": 30, "kv_dtype": "int8"},
    {"slots": 6, "kv_dtype": "int8", "slot_dtype": "int4", "slot_score": "learned", "more_slots": 4, "more_heads": (0,)},
    {"slots": 6, "slot_dtype": "int4"},
]


@pytest.mark.parametrize("changes", SLOTS, ids=str)
@pytest.mark.parametrize("spec", [WINDOW, BEHIND, replace(BEHIND, feature_dim=8, sinks=0)], ids=["window", "memory", "narrow"])
def test_slots(spec: MixerSpec, changes: dict[str, Any], called: list[tuple[Any, ...]]) -> None:
    """While they fill up and when they are full, for each kv head its own; from the second token on, and after a chunk."""
    mixer, other = both(replace(spec, **changes))
    inputs = tokens(90)
    with torch.no_grad():
        for first in (1, 60):
            called.clear()
            sizes = [first] + [1] * (90 - first)
            (found, state), (expected, last) = run(mixer, inputs, sizes), run(other, widened(inputs), sizes)
            assert len(called) == 90 - first
            assert deviation(found, expected) < 5e-5
            assert found.isfinite().all()
            same_slots(state, last)


def same_slots(found: State, expected: State) -> None:
    for name in found:
        if name.endswith("slot_score") or name == "more_score":  # empty places are so in both
            assert torch.equal(found[name].isfinite(), expected[name].isfinite()), name
    finite = [
        {name: x.nan_to_num(neginf=0.0) if x.is_floating_point() else x.to(torch.int64) for name, x in state.items()}
        for state in (found, expected)
    ]
    same_state(*finite)


def test_a_window_alone(called: list[tuple[Any, ...]]) -> None:
    for spec in (WINDOW, replace(WINDOW, sinks=0, window=1), replace(WINDOW, kv_dtype="int8")):
        mixer, other = both(spec)
        called.clear()
        with torch.no_grad():
            (found, state), (expected, last) = (run(m, x, [1] * 40) for m, x in ((mixer, tokens(40)), (other, widened(tokens(40)))))
        assert len(called) == 39
        assert deviation(found, expected) < 5e-5
        same_state(state, last)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", [WINDOW, BEHIND], ids=["window", "memory"])
def test_slots_of_a_model_in_bfloat16(spec: MixerSpec, state_dtype: str, called: list[tuple[Any, ...]]) -> None:
    """As PyTorch's steps on the same numbers; several rows, which have seen other numbers of tokens."""
    spec = replace(spec, slots=5, kv_dtype="int8", slot_dtype="int4", slot_score="learned", state_dtype=state_dtype)
    mixer, other = both(spec)[0], both(spec)[0]
    other.by_kernel = lambda *_: None  # type: ignore[method-assign]
    inputs = tokens(70, dtype=torch.bfloat16)
    first = replace(part(inputs, 0, 40), mask=torch.arange(40) >= torch.tensor([[0], [31]]))
    with torch.no_grad():
        start = mixer(first, keep=True)[1]
        (found, state), (expected, last) = (run(m, part(inputs, 40, 70), [1] * 30, start) for m in (mixer, other))
    assert len(called) == 30
    assert found.dtype == torch.bfloat16
    assert deviation(found.double(), expected.double()) < 2.0**-7
    for name in ("k", "v", "slot_k", "slot_v"):
        assert torch.equal(state[name], last[name])


def test_of_equal_scores_the_youngest_goes(called: list[tuple[Any, ...]]) -> None:
    """And a token whose score is no number finds no place."""
    mixer, other = both(replace(WINDOW, slots=4))
    inputs = tokens(60)
    with torch.no_grad():
        state = mixer(part(inputs, 0, 40), keep=True)[1]
        assert state is not None
        state["slot_score"][:] = torch.tensor([3.0, 1.0, 1.0, 2.0])
        state["scores"][..., 0] = torch.tensor([1.0, 1.5]).repeat(4)  # of which every other one pushes one of two out
        state["scores"][:, 0, 6, 0] = torch.nan
        last: State | None = {name: x.double() if x.is_floating_point() else x for name, x in state.items()}
        for at in range(40, 46):
            found, state = mixer(part(inputs, at, at + 1), state, keep=True)
            expected, last = other(part(widened(inputs), at, at + 1), last, keep=True)
            assert deviation(found, expected) < 5e-5
    assert len(called) == 6
    assert state is not None
    assert last is not None
    same_slots(state, last)


@pytest.mark.parametrize("spec", [replace(DEFAULT, far_rope=False), replace(BEHIND, **SLOTS[2])], ids=["memory", "slots"])
def test_what_a_state_is_left_in(spec: MixerSpec, called: list[tuple[Any, ...]]) -> None:
    """In tensors of its own, unless the cache says that it may be written to: then the same numbers, where the old ones were."""
    mixer = both(spec)[0]
    inputs = tokens(100)
    with torch.no_grad():
        state = mixer(part(inputs, 0, 99), keep=True)[1]
        assert state is not None
        before = {name: x.clone() for name, x in state.items()}
        out, after = mixer(part(inputs, 99, 100), state, keep=True)
        assert after is not None
        assert all(torch.equal(x, before[name]) for name, x in state.items())
        again, there = mixer(part(inputs, 99, 100), state, keep=True, in_place=True)
    assert there is not None
    assert torch.equal(out, again)
    for name, x in there.items():
        assert torch.equal(x, after[name])
        assert (x is state[name]) == (name != "count")
    checked(called[-1])


def test_slots_that_pytorch_reads(called: list[tuple[Any, ...]]) -> None:
    """Scores of other kinds, keys that slots do not hold, stored in 16 bits, parts that are off, terraces."""
    inputs = tokens(30)
    with torch.no_grad():
        others: list[dict[str, Any]] = [
            {"slot_score": "norm"}, {"slot_score": "recall"}, {"far_rope": False}, {"window_kind": "terraced"}, {"decay": "head"},
        ]  # fmt: skip
        for changes in others:
            run(both(replace(BEHIND, slots=4, **changes))[0], inputs, [1] * 30)
        mixer = both(replace(BEHIND, slots=4))[0]
        run(mixer, tokens(30, dtype=torch.bfloat16), [1] * 30)
        for half in ("far", "near", "slots"):
            mixer.ablate = half
            run(mixer, inputs, [1] * 30)
    assert not called
