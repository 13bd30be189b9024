"""A compiled step is the model's own step: tokens, logits and states, whoever's turn it is, and it is compiled once."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from linearize.errors import UsageError
from linearize.modeling import native
from linearize.modeling.modeling_linearized import ablated, mode
from linearize.modeling.spec import MixerSpec
from linearize.serving import compiled
from linearize.serving.compiled import compile_step
from linearize.testing import linearized, method_points, tiny_llama
from linearize.testing.laws import EXACT, assert_close

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler of compiled steps is not installed")

OPTIONS = dict(compiled.OPTIONS)
SLOTS = {
    "window": 4, "sinks": 2, "slots": 3, "more_slots": 2, "more_heads": (1,), "slot_score": "attention", "kv_dtype": "int8",
    "slot_dtype": "int4",
}  # fmt: skip


def spec_of(method: str, **changes: Any) -> MixerSpec:
    return replace(next(p.spec for p in method_points() if p.id.startswith(method)), **changes)


POINTS = {
    "default": spec_of("default"),
    "whole steps by a kernel": spec_of("default", feature_dim=native.WIDTH, far_rope=False, window=8),
    "slots": spec_of("default", **SLOTS),
    "gated-deltanet": spec_of("gated-deltanet"),
}


@pytest.fixture(scope="module", autouse=True)
def kept(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", params=POINTS)
def models(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A model, and the same with a compiled step."""
    plain = linearized(tiny_llama(), POINTS[request.param])
    quick = copy.deepcopy(plain)
    compile_step(quick, batch=2)
    return plain, quick


def prompt(*size: int, seed: int = 3) -> Tensor:
    return torch.randint(2, 64, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, ids: Tensor, sizes: list[int], cache: Any) -> Tensor:
    """Of calls of `sizes` tokens on a cache."""
    start, found = 0, []
    for size in sizes:
        found.append(model(ids[:, start : start + size], past_key_values=cache, use_cache=True).logits)
        start += size
    return torch.cat(found, 1)


def count_calls(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    run = model.linearize_step.run
    monkeypatch.setattr(model.linearize_step, "run", lambda *given: (calls.append(1), run(*given))[1])
    return calls


def test_steps_are_the_models_own(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps, calls of several tokens between them, and a second cache in turn: logits and final states."""
    plain, quick = models
    calls = count_calls(quick, monkeypatch)
    sizes = [9, *[1] * 7, 3, *[1] * 4]
    texts = [prompt(2, sum(sizes), seed=seed) for seed in (1, 2)]
    own, caches = [DynamicCache() for _ in texts], [DynamicCache() for _ in texts]
    expected = [logits(plain, ids, sizes, cache) for ids, cache in zip(texts, own, strict=True)]
    found: list[list[Tensor]] = [[], []]
    start = 0
    for size in sizes:
        for i, ids in enumerate(texts):
            found[i].append(logits(quick, ids[:, start : start + size], [size], caches[i]))
        start += size
    assert len(calls) == 22
    for i in (0, 1):
        assert_close(torch.cat(found[i], 1), expected[i], EXACT[torch.float32], "logits")
        for layer, other in zip(caches[i].layers, own[i].layers, strict=True):
            assert layer.get_seq_length() == other.get_seq_length() == sum(sizes)
            for name, x in layer.state.items():
                assert_close(x, other.state[name], EXACT[torch.float32], name)


def test_generation_with_pads(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, quick = models
    calls = count_calls(quick, monkeypatch)
    ids, mask = prompt(2, 11), torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    settings = GenerationConfig(pad_token_id=0, eos_token_id=None, max_new_tokens=12, do_sample=False)
    given = {"attention_mask": mask, "generation_config": settings}
    assert torch.equal(quick.generate(ids, **given), plain.generate(ids, **given))
    assert len(calls) == 11
    beams = {**given, "num_beams": 2}  # four rows: the step does not take them
    assert torch.equal(quick.generate(ids, **beams), plain.generate(ids, **beams))
    assert len(calls) == 11


@torch.no_grad()
def test_a_copy_of_the_cache_goes_its_own_way(models: tuple[Any, Any]) -> None:
    quick = models[1]
    ids, cache = prompt(2, 20), DynamicCache()
    logits(quick, ids, [8, 1, 1], cache)
    fork = copy.deepcopy(cache)
    expected = logits(quick, ids[:, 10:], [1] * 10, fork)
    logits(quick, ids[:, :5], [1] * 5, copy.deepcopy(cache))
    assert torch.equal(logits(quick, ids[:, 10:], [1] * 10, cache), expected)


@torch.no_grad()
def test_what_it_does_not_take(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another position, recording, hidden states, a pad, the teacher: the plain model answers, and then the step goes on."""
    quick = models[1]
    calls = count_calls(quick, monkeypatch)
    ids, caches = prompt(2, 30), [DynamicCache(), DynamicCache()]
    given: list[dict[str, Any]] = [
        {}, {"output_hidden_states": True}, {"position_ids": torch.full((2, 1), 9)}, {},
        {"attention_mask": torch.ones(2, 13).index_fill_(1, torch.tensor([12]), 0)}, {},
    ]  # fmt: skip
    both = [(model, cache, []) for model, cache in zip(models, caches, strict=True)]
    for model, cache, found in both:
        logits(model, ids, [8], cache)
        for i, options in enumerate(given):
            found.append(model(ids[:, 8 + i : 9 + i], past_key_values=cache, use_cache=True, **options).logits)
    for own, expected in zip(both[1][2], both[0][2], strict=True):
        assert_close(own, expected, EXACT[torch.float32], "logits")
    assert len(calls) == 2  # after the pad a row's count is not the cache's length: without a mask the model counts the pad
    with mode(quick, "teacher"):
        quick(ids[:, :1])
    caches[1].activate_past_recording()
    quick(ids[:, :1], past_key_values=caches[1], use_cache=True)
    assert len(calls) == 2


@torch.no_grad()
def test_it_reads_the_models_weights(models: tuple[Any, Any]) -> None:
    """A changed weight counts at once; a cast model takes its plain steps."""
    plain, quick = (copy.deepcopy(model) for model in models)
    assert quick.linearize_step is None
    compile_step(quick, batch=2)
    ids = prompt(2, 9)
    for model in (plain, quick):
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    found = logits(quick, ids, [8, 1], DynamicCache())
    assert_close(found, logits(plain, ids, [8, 1], DynamicCache()), EXACT[torch.float32], "after a weight changed")
    wide = logits(quick.double(), ids, [8, 1], DynamicCache())
    assert_close(wide, logits(plain.double(), ids, [8, 1], DynamicCache()), EXACT[torch.float64], "after a cast")


def test_compiled_once(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = sorted(compiled.folder().iterdir())
    told: list[str] = []
    compile_step(copy.deepcopy(models[0]), batch=2, report=lambda task, *_, **__: told.append(task))
    assert sorted(compiled.folder().iterdir()) == made
    assert not told
    assert compiled.OPTIONS == OPTIONS, "the compiler wrote into what the next one is asked by"


def test_what_was_traced_with_kernels_is_not_run_without_them(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    weights = models[1].linearize_step.weights
    keys = []
    for available in (True, False):
        monkeypatch.setattr(compiled, "takes", lambda _, found=available: found)
        keys.append(compiled._key(models[1], weights, 2))
    assert keys[0] != keys[1]


@pytest.mark.parametrize(
    ("spec", "layers", "why"),
    [(spec_of("default", window_kind="terraced"), (0, 1), "terraced"), (POINTS["default"], (1,), "softmax layers"),
     (spec_of("default", **{**SLOTS, "slot_score": "recall"}), (0, 1), "recall")],
    ids=["terraced", "hybrid", "recall"],
)  # fmt: skip
def test_what_cannot_be_compiled(spec: MixerSpec, layers: tuple[int, ...], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        compile_step(linearized(tiny_llama(), spec, layers))


def test_an_ablated_mixer_is_not_compiled_whole(models: tuple[Any, Any]) -> None:
    plain, quick = models
    ids = prompt(2, 9)
    with ablated(plain, "far"), ablated(quick, "far"):
        found = logits(quick, ids, [8, 1], DynamicCache())
        assert_close(found, logits(plain, ids, [8, 1], DynamicCache()), EXACT[torch.float32], "without the far half")


def test_files_are_whole(models: tuple[Any, Any]) -> None:
    assert all(path.suffix == ".pt2" and ".tmp-" not in path.name for path in Path(compiled.folder()).iterdir())
