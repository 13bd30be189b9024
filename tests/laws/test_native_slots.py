"""The kernels for exact slots and for how they are stored: each is its PyTorch form, to the last bit where nothing is summed."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from called_kernels import needs_kernels, recorded, same_part
from torch import Tensor

from linearize.modeling import native
from linearize.modeling.mixer import Mixer
from linearize.modeling.native_operators import SHAPES
from linearize.modeling.native_slots import among_slots, read_stored
from linearize.modeling.products import LN2, LOG2E
from linearize.modeling.slots import Admission, Tokens, admit, picked
from linearize.modeling.spec import Shape
from linearize.modeling.storage import EIGHT, FOUR, kept, opened, rounded
from linearize.modeling.window import Keys, Part, Scores, attend
from linearize.testing import method_points, random_inputs, randomise
from linearize.testing.laws import deviation, run

pytestmark = needs_kernels
SHAPE = Shape(hidden_size=64, heads=4, kv_heads=2, head_dim=16, value_dim=16)
LENGTHS = (1, 2, 17, 128, 150)
SIZES = (1, 5, 40, 300)


@pytest.fixture(autouse=True)
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are called."""
    return recorded(monkeypatch)


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch, called: list[str]) -> Any:
    """Calls a function with kernels, and without: both results."""

    def both(function: Any, *arguments: Any) -> tuple[Any, Any]:
        monkeypatch.setenv("LINEARIZE_BACKEND", "native")
        found = function(*arguments)
        count = len(called)
        assert count, "no kernel was called"
        monkeypatch.setenv("LINEARIZE_BACKEND", "torch")
        expected = function(*arguments)
        assert len(called) == count
        return found, expected

    return both


# ---- who stays ----


def _tokens(score: Tensor, first: int) -> Tokens:
    number = torch.arange(first, first + score.shape[2], dtype=torch.float32)
    return {"k": number[:, None].expand(*score.shape, 1), "score": score}


def _scores(*size: int, levels: int) -> Tensor:
    """Few levels are ties; 0 and -0 are one."""
    if levels >= 100:
        return torch.randn(size)
    return (torch.randint(levels, size) - levels // 2) * torch.where(torch.rand(size) < 0.5, 1.0, -1.0)


@pytest.mark.parametrize("filled", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_who_stays(levels: int, filled: float, by_torch: Any, called: list[str]) -> None:
    """Arrivals that are not there, empty slots, more slots than arrivals and fewer, scores that are learnt."""
    for size, new in itertools.product(SIZES, LENGTHS):
        old, came = _scores(3, 2, size, levels=levels), _scores(3, 2, new, levels=levels)
        old[..., int(filled * size) :] = -torch.inf
        valid = torch.rand(3, new) < torch.tensor([[1.0], [0.7], [0.0]])
        found, expected = by_torch(admit, _tokens(old, 0), _tokens(came.requires_grad_(), size), valid)
        _same_admission(found, expected)
    assert set(called) == {"slots_admit", "slots_pick"}


def _same_admission(found: Admission, expected: Admission) -> None:
    assert torch.equal(found.gone, expected.gone)
    assert torch.equal(found.member, expected.member)
    assert torch.equal(found.out, expected.out)
    out = found.out[:, None].expand_as(found.lost)
    assert torch.equal(found.lost[out], expected.lost[out])
    assert torch.equal(found.slots["score"], expected.slots["score"])
    held = found.slots["score"] > -torch.inf
    assert torch.equal(found.slots["k"][held], expected.slots["k"][held])


def test_a_slot_may_be_empty_anywhere(by_torch: Any) -> None:
    old, came = _scores(2, 2, 30, levels=7), _scores(2, 2, 20, levels=7)
    old[torch.rand(2, 1, 30).expand_as(old) < 0.3] = -torch.inf
    _same_admission(*by_torch(admit, _tokens(old, 0), _tokens(came, 30), torch.rand(2, 20) < 0.8))


def test_scores_that_are_none(called: list[str]) -> None:
    """A token whose score is not a number is in no slot; an infinite one stays."""
    old, came = torch.tensor([[[1.0, torch.nan, 3.0]]]), torch.tensor([[[torch.nan, torch.inf, 2.0, torch.inf]]])
    found = admit(_tokens(old, 0), _tokens(came, 3), torch.ones(1, 4, dtype=torch.bool))
    assert found.slots["k"][0, 0, :, 0].tolist() == [2, 4, 6]
    assert found.lost[0, 0, 2:].tolist() == [0, 5]
    assert found.out[0].tolist() == [False, False, True, True]
    assert set(called) == {"slots_admit", "slots_pick"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
def test_tokens_that_are_picked(dtype: torch.dtype, by_torch: Any) -> None:
    """In any order, of heads that share an index, from what does not lie side by side."""
    for width in ((), (1,), (37,)):
        slots, arrivals = (torch.randint(100, (2, 6, n, *width)).to(dtype) for n in (9, 5))
        slots = slots.transpose(0, 1).contiguous().transpose(0, 1)
        scores = torch.zeros(2, 3, 9), torch.zeros(2, 3, 5)
        given = ({"k": slots, "score": scores[0]}, {"k": arrivals, "score": scores[1]})
        for index in (torch.randint(14, (2, 3, 20)), torch.arange(14).expand(2, 3, -1), torch.zeros(2, 3, 0).long()):
            found, expected = by_torch(picked, *given, index)
            assert torch.equal(found["k"], expected["k"])


def test_what_is_picked_has_a_gradient(by_torch: Any) -> None:
    slots, arrivals = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 2, 4, requires_grad=True)
    given = ({"k": slots, "score": slots[..., 0]}, {"k": arrivals, "score": arrivals[..., 0].detach()})
    index = torch.tensor([[[4, 1], [3, 3]]])
    for found in by_torch(picked, *given, index):
        grad = torch.autograd.grad(found["k"].sum(), arrivals)[0]
        assert grad[0, :, :, 0].tolist() == [[0, 1], [2, 0]]


# ---- what queries read ----


@pytest.mark.parametrize("filled", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("size", SIZES)
def test_reading(size: int, filled: float, called: list[str]) -> None:
    for time in LENGTHS:
        old, came = torch.randn(2, 2, size), torch.randn(2, 2, time)
        old[..., int(filled * size) :] = -torch.inf
        admission = admit(_tokens(old, 0), _tokens(came, size), torch.rand(2, time) < torch.tensor([[0.9], [0.0]]))
        q = torch.randn(2, time, 4, 16).transpose(1, 2).unflatten(1, (2, 2))
        k, v = torch.randn(2, 2, size + time, 16), torch.randn(2, 2, size + time, 20)
        found = among_slots(q, k, v, admission.gone, size, 0.3 * LOG2E)
        group = Keys(k.double()[:, :, None], v.double()[:, :, None], admission.member[:, :, None])
        expected = attend(q.double().unsqueeze(3), group, Scores(0.3))[0]
        same_part(Part(found[0], found[1], found[2] * LN2), expected, f"{time} queries")
    assert "slots_attend" in called


@pytest.mark.parametrize("dtype", [torch.float32, EIGHT, FOUR])
@pytest.mark.parametrize("filled", [0.0, 0.6, 1.0])
def test_reading_as_they_are_stored(filled: float, dtype: torch.dtype, called: list[str]) -> None:
    """By one token; any slot may be empty."""
    for size, (dim, width) in itertools.product(SIZES, ((16, 16), (64, 40))):
        q, k, v = torch.randn(2, 2, 3, 1, dim), torch.randn(2, 2, size, dim), torch.randn(2, 2, size, width)
        score = torch.randn(2, 2, size).where(torch.rand(2, 2, size) < filled, -torch.inf)
        k, v = (kept(x, dtype) for x in (k, v))
        found = read_stored(q, k, v, score, 0.3 * LOG2E)
        wide_k, wide_v = (opened(x, torch.float64)[:, :, None] for x in (k, v))
        group = Keys(wide_k, wide_v, (score > -torch.inf)[:, :, None, None])
        expected = attend(q.double().unsqueeze(3), group, Scores(0.3))[0]
        same_part(Part(found[0], found[1], found[2] * LN2), expected, f"{size} slots")
    assert "slots_read" in called


def test_a_trace_takes_each_for_one_operator(called: list[str]) -> None:
    """What it gives is told without numbers, and it writes to nothing that it is given."""
    q, x, score = torch.randn(2, 2, 3, 1, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9)
    given = {
        "admission": (score, 5),
        "pick": ([x, score], [x[:, :, :3], score[:, :, :3]], torch.tensor([0, 11, 4]).expand(2, 2, 3)),
        "among_slots": (q, x, x, torch.full((2, 2, 9), 1), 8, 0.3),
        "read_stored": (q, kept(x, FOUR), kept(x, FOUR), score, 0.3),
        "keep": (x, True),
        "read_back": (x, False),
        "read": (kept(x, EIGHT), False),
    }
    made = {operator._schema.name.removeprefix("linearize::"): operator for operator in (make() for make in native.OPERATORS)}
    assert set(made) == {*given, *SHAPES}
    for name, arguments in given.items():
        count = len(called)
        torch.library.opcheck(made[name], arguments, test_utils=("test_schema", "test_faketensor"))
        assert len(called) > count, name


# ---- mixers ----

SLOTS: dict[str, Any] = {"slots": 20, "window": 16, "sinks": 2, "slot_score": "learned"}


@pytest.mark.parametrize("whole", [False, True], ids=["parts", "whole steps"])
@pytest.mark.parametrize("ablate", [None, "slots"])
@pytest.mark.parametrize(
    "changes",
    [
        {"more_slots": 30, "more_heads": (1,), "kv_dtype": "int8", "slot_dtype": "int4"},
        {"kv_dtype": "int8"},
        {"slot_score": "norm"},
        {"window_kind": "terraced"},
        {"slot_score": "recall"},
        {"far_rope": False, "more_slots": 3, "more_heads": (0, 1)},
    ],
    ids=str,
)
def test_mixers_with_slots(changes: dict[str, Any], ablate: str | None, whole: bool, by_torch: Any, called: list[str]) -> None:
    """In calls of many tokens and of one, with rows of different lengths, as PyTorch has them; steps by one kernel, or in parts."""
    default = next(point.spec for point in method_points() if point.id == "default")
    torch.manual_seed(0)
    mixer = randomise(Mixer(replace(default, **{**SLOTS, **changes}), SHAPE))
    mixer.ablate = ablate
    if not whole:
        mixer.by_kernel = lambda *_: None  # type: ignore[method-assign]
    inputs = random_inputs(SHAPE, 150, dtype=torch.float32, softcap=None)

    def through() -> Any:
        with torch.no_grad():
            return run(mixer, inputs, [70, 1, 1, 40, 1, 1, 35, 1])

    (found, state), (expected, other) = by_torch(through)
    assert deviation(found, expected) < 1e-4
    for name in other:
        if not state[name].is_floating_point():
            assert torch.equal(state[name], other[name]), name
            continue
        there = other[name] > -torch.inf
        assert torch.equal(there, state[name] > -torch.inf)
        assert deviation(state[name][there], other[name][there]) < 1e-3, name
    assert {"slots_admit", "slots_pick"} <= set(called)
    assert ablate is not None or whole or "slots_read" in called


# ---- how they are stored ----


def _numbers(channels: int) -> Tensor:
    """Large and small ones, equal ones, halves between two codes, zeros, blocks of hardly any range, far off, and beyond any."""
    x = torch.randn(40, 3, channels) * torch.logspace(-30, 30, 40)[:, None, None]
    x[1], x[2], x[3] = 0.0, -7.3, torch.randint(-2, 3, x[3].shape).float()
    x[4] = 1 + torch.randint(2, x[4].shape) * 2.0**-20
    x[5] = torch.randint(31, x[5].shape) / 2
    x[5, :, 0], x[5, :, 1] = 0.0, 15.0
    x[8] = 1.625 * 34.76  # as far off as an offset of 8 bits goes, by 0.02 of half a step
    x[8, :, 0], x[8, :, 1] = 1.625 * (34.76 - 7.5), 1.625 * (34.76 + 7.5)
    x[6], x[7] = torch.randn(3, channels) * 1e-40, torch.where(torch.rand(3, channels) < 0.5, 3.4e38, -3.4e38)
    return x


@pytest.mark.parametrize("dtype", [EIGHT, FOUR])
@pytest.mark.parametrize("channels", [2, 16, 32, 64, 72, 128])
def test_storage(channels: int, dtype: torch.dtype, by_torch: Any, called: list[str]) -> None:
    x = _numbers(channels)
    stored, expected = by_torch(kept, x, dtype)
    assert torch.equal(stored, expected)
    found, other = by_torch(opened, stored, torch.float32)
    _same(found, other)
    _same(*by_torch(rounded, x.transpose(0, 1), dtype))
    assert set(called) == {"storage_keep", "storage_open"}


@pytest.mark.parametrize("dtype", [EIGHT, FOUR])
@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_storage_of_what_is_not_finite(odd: float, dtype: torch.dtype, by_torch: Any) -> None:
    x = torch.randn(9, 64)
    x[2, 5], x[4], x[5, 40:], x[6, 3:5] = odd, odd, odd, torch.tensor([-odd, odd])
    for function in (rounded, _through):
        _same(*by_torch(function, x, dtype))


def _same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def _through(x: Tensor, dtype: torch.dtype) -> Tensor:
    return opened(kept(x, dtype), x.dtype)


@pytest.mark.parametrize("dtype", [EIGHT, FOUR])
def test_a_gradient_passes_through_storage(dtype: torch.dtype, by_torch: Any) -> None:
    x = torch.randn(5, 64, requires_grad=True)
    found, expected = by_torch(rounded, x, dtype)
    assert torch.equal(found, expected)
    assert torch.equal(torch.autograd.grad(found.sum(), x)[0], torch.ones(5, 64))


def test_other_numbers_are_stored_by_pytorch(called: list[str]) -> None:
    x = torch.randn(3, 64)
    for other in (x.double(), x.bfloat16(), x[:0]):
        assert rounded(other, FOUR).dtype == other.dtype
    assert opened(kept(x.double(), FOUR), torch.float64).dtype == torch.float64
    assert not called
