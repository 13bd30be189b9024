"""Laws 1 to 6 and 9 for every registered method and for legal points that cover all pairs of choices, GQA and MHA."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from linearize.modeling.spec import MixerSpec
from linearize.testing import (
    bidirectional_points,
    method_points,
    pairwise_points,
    random_inputs,
    random_mixer,
    random_points,
    tiny_shape,
)
from linearize.testing.laws import LAWS, STREAMS, deviation, run
from linearize.testing.points import AXES, pairs

LONG = 4096

POINTS = [*method_points(), *pairwise_points(), *bidirectional_points()]  # each with GQA or MHA in turn
SETTINGS: dict[str, tuple[MixerSpec, int]] = {
    f"{p.id}-{'mha' if i % 2 else 'gqa'}": (p.spec, 4 if i % 2 else 2) for i, p in enumerate(POINTS)
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("spec", "kv_heads"), SETTINGS.values(), ids=SETTINGS)
def test_law(law: str, spec: MixerSpec, kv_heads: int) -> None:
    LAWS[law](spec, kv_heads)


def drift(spec: MixerSpec) -> float:
    """How far 4,096 steps on bf16 inputs end up from the parallel form in fp32 on the same numbers."""
    mixer, inputs = random_mixer(spec, dtype=torch.float32), random_inputs(tiny_shape(), LONG, 1, torch.bfloat16)
    with torch.inference_mode():
        expected = mixer(replace(inputs, **{name: getattr(inputs, name).float() for name in STREAMS}))[0]
        return deviation(run(mixer, inputs, [1] * LONG)[0].float(), expected)


# A state in fp32 adds nothing to the rounding of bf16 outputs. One in bf16 errs by an eighth at most: its dithered roundings
# walk at random, and the values here have mean zero, which is the worst case.
BOUNDS = {"float32": 2.0**-8, "bfloat16": 2.0**-3}


@pytest.mark.parametrize(("method", "state_dtype"), [("default", "float32"), ("hedgehog", "bfloat16")])
def test_long_decode_in_bf16(method: str, state_dtype: str) -> None:
    spec = next(p.spec for p in method_points() if p.id.startswith(method))
    assert drift(replace(spec, state_dtype=state_dtype)) < BOUNDS[state_dtype]


@pytest.mark.exhaustive
@pytest.mark.parametrize("state_dtype", BOUNDS)
@pytest.mark.parametrize("spec", [p.spec for p in method_points()], ids=[p.id for p in method_points()])
def test_long_decode_in_bf16_everywhere(spec: MixerSpec, state_dtype: str) -> None:
    assert drift(replace(spec, state_dtype=state_dtype)) < BOUNDS[state_dtype]


def test_points_are_the_same_in_every_run() -> None:
    first = pairwise_points()
    pairwise_points.cache_clear()
    assert pairwise_points() == first
    assert all(not point.spec.problems() for point in [*first, *method_points()])


def test_every_choice_is_in_some_point() -> None:
    for axis, values in AXES.items():
        assert {getattr(point.spec, axis) for point in pairwise_points()} == set(values), axis


@pytest.mark.exhaustive
def test_pairwise_points_miss_no_legal_pair() -> None:
    """The whole product cannot be walked: thousands of random legal points stand for it."""
    legal = set().union(*(pairs(point.spec) for point in random_points(5000, seed=1)))
    assert legal <= set().union(*(pairs(point.spec) for point in pairwise_points()))


@pytest.mark.exhaustive
def test_random_points() -> None:
    for number, point in enumerate(random_points(1000)):
        for law in ("equations", "split", "padding", "handover"):
            try:
                LAWS[law](point.spec, 4 if number % 2 else 2)
            except AssertionError as error:
                raise AssertionError(f"{law}, {point.id}: {error}") from None


BIDIRECTIONAL = bidirectional_points()


def test_a_bidirectional_mixer_has_no_state() -> None:
    spec = BIDIRECTIONAL[0].spec
    mixer, inputs = random_mixer(spec), random_inputs(tiny_shape(), 5)
    assert spec.state_bytes(tiny_shape()) == 0
    assert mixer(inputs)[1] is None
    for options in ({"keep": True}, {"state": {"count": torch.zeros(2, dtype=torch.long)}}):
        with pytest.raises(ValueError, match="has no state"):
            mixer(inputs, **options)


@pytest.mark.parametrize(
    "changes",
    [{"window": 4, "merge": "denominator", "coverage": "older"}, {"rule": "delta", "normalise": False}, {"decay": "head"},
     {"conv": 2}, {"experts": 2, "active": 1}, {"normalise": False}, {"state_dtype": "bfloat16"}],
    ids=str,
)  # fmt: skip
def test_what_no_bidirectional_mixer_has(changes: dict[str, Any]) -> None:
    spec = replace(MixerSpec(merge="far", coverage="all"), **changes)
    assert not spec.problems()
    assert len(replace(spec, causal=False).problems()) == 1 + (changes.get("rule") == "delta")


def test_which_methods_serve_an_encoder() -> None:
    served = {point.id.removeprefix("bidirectional-") for point in BIDIRECTIONAL}
    assert served >= {
        "based-linear", "cosformer", "feedforward-kernel", "flatten", "hedgehog", "linear-transformer", "lln", "nalaformer",
        "performer", "rebased", "t2r",
    }  # fmt: skip
