"""Specs in a checkpoint's config: what is left out must mean the same to every version that reads it."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from linearize.modeling.plans import plan_layers, shared
from linearize.modeling.spec import MixerSpec
from linearize.testing.points import Point, bidirectional_points, method_points, pairwise_points

LEFT_OUT = {  # fields that a config leaves out have these values: to change one, or drop one, takes another schema
    "rule": "additive", "feature_map": "hedgehog", "feature_dim": 0, "tied_maps": False, "max_length": 0, "share_kv": False,
    "scaled": False, "decay": "none", "gate_form": "sigmoid", "gate_rank": 0, "gate_divisor": 16.0, "gate_key": "none",
    "negative": False, "deltas": 1, "rank_one": False, "experts": 0, "active": 0, "coverage": "older", "normalise": True,
    "norm": "none", "norm_eps": 1e-6, "out_gate": "none", "gate_first": False, "gate_bias": True, "out_map": False, "skip": False,
    "window": 0, "window_kind": "sliding", "sinks": 0, "slots": 0, "more_slots": 0, "more_heads": (), "slot_score": "attention",
    "slot_target": "largest", "slot_fade": 0.75, "null_logits": 0, "merge": "denominator", "near_weight": 0.5, "far_weight": None,
    "learned_weights": False, "far_mass": "none", "far_rope": True, "far_norm": True, "conv": 0, "conv_v": False,
    "conv_silu": False, "state_dtype": "float32", "kv_dtype": "model", "slot_dtype": "kv", "causal": True,
}  # fmt: skip


@pytest.mark.parametrize("point", [*method_points(), *pairwise_points(), *bidirectional_points()], ids=lambda point: point.id)
def test_what_a_config_says_is_the_whole_spec(point: Point) -> None:
    for said in (point.spec.stored(), point.spec.to_dict()):  # a config may say all fields, too
        assert MixerSpec.from_dict(json.loads(json.dumps(said))) == point.spec


def test_what_a_config_leaves_out_means_the_same_in_every_version() -> None:
    assert {name: value for name, value in MixerSpec().to_dict().items() if name in LEFT_OUT} == LEFT_OUT


def test_a_field_of_its_own_default_says_nothing() -> None:
    assert MixerSpec().stored() == {}


def test_layers_that_share_what_they_say_are_whole_again() -> None:
    shapes = ({"heads": 4, "kv_heads": 2}, {"heads": 4, "kv_heads": 4})
    mixers = [point.spec.stored() for point in (*method_points(), *pairwise_points())]
    layers = [
        {"index": i, "module": f"layers.{i}", "rope": "half", "method": f"m{i % 2}", "mixer": mixer, "shape": shapes[i % 3 == 0]}
        for i, mixer in enumerate([{}, *mixers])
    ]
    for some in (layers[:0], layers[:1], layers[1:2] * 2, *pairwise(layers), layers):
        said = json.loads(json.dumps(shared(some)))
        assert plan_layers(said) == json.loads(json.dumps(list(some)))
        assert [layer["index"] for layer in said["layers"]] == [layer["index"] for layer in some]


def test_what_all_layers_say_is_said_once() -> None:
    layers = [{"index": i, "module": f"m{i}", "mixer": {"window": 64, "slots": i}, "shape": {"heads": 4}} for i in range(3)]
    assert shared(layers) == {
        "common": {"mixer": {"window": 64}, "shape": {"heads": 4}},
        "layers": [{"index": i, "module": f"m{i}", "mixer": {"slots": i}} for i in range(3)],
    }


def test_a_layer_may_say_otherwise() -> None:
    said = {"common": {"rope": "half", "mixer": {"window": 64}}, "layers": [{"index": 0, "rope": "pairs", "mixer": {"window": 8}}]}
    assert plan_layers(said) == [{"index": 0, "rope": "pairs", "mixer": {"window": 8}}]
