"""The kernel for one token of a whole decoder layer: to the bit what the layer's parts come to, and whose layers take it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from called_kernels import DEFAULT, needs_kernels
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from linearize import convert_model
from linearize.modeling import native_operators, one_layer
from linearize.modeling.modeling_linearized import ablated, mode
from linearize.modeling.spec import MixerSpec
from linearize.serving.int8 import Int8Linear, quantize
from linearize.testing import linearized
from linearize.testing.families import tiny_family

pytestmark = needs_kernels
SIZES = {"head_dim": 32, "hidden_size": 64, "intermediate_size": 96}
SPEC = replace(DEFAULT, window=8, sinks=2, feature_dim=16)
LAYERS = 3
Calls = list[tuple[Any, ...]]


@pytest.fixture(autouse=True)
def called(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What the kernel was given, call by call, by calls that must have kernels."""
    monkeypatch.setenv("LINEARIZE_BACKEND", "native")
    calls: Calls = []
    step = one_layer.layer_step

    def counted(*given: Any) -> Any:
        calls.append(given)
        return step(*given)

    monkeypatch.setattr(one_layer, "layer_step", counted)
    return calls


def model_of(family: str = "llama", spec: MixerSpec = SPEC, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    model = linearized(tiny_family(family, **{**SIZES, **changes}), spec, range(LAYERS)).to(dtype)
    for attention in model.linearize_swapped:  # as a checkpoint is loaded
        attention.linearize.float()
    return model


def texts(rows: int, time: int) -> Tensor:
    return torch.randint(2, 97, (rows, time), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def read(model: Any, ids: Tensor, first: int, mask: Tensor | None = None) -> tuple[Tensor, Any]:
    """Logits of the tokens after the `first`, one at a time, and the cache."""
    cache = model(ids[:, :first], attention_mask=None if mask is None else mask[:, :first], use_cache=True).past_key_values
    found = []
    for at in range(first, ids.shape[1]):
        own = None if mask is None else mask[:, : at + 1]
        found.append(model(ids[:, at : at + 1], attention_mask=own, past_key_values=cache, use_cache=True).logits)
    return torch.cat(found, 1), cache


def by_parts(monkeypatch: pytest.MonkeyPatch, *given: Any) -> tuple[Tensor, Any]:
    with monkeypatch.context() as patch:
        patch.setattr(one_layer, "_stepped", lambda *_: None)
        return read(*given)


def same(found: tuple[Tensor, Any], expected: tuple[Tensor, Any]) -> None:
    """Logits and states, to the bit."""
    assert torch.equal(found[0], expected[0])
    for layer, other in zip(found[1].layers, expected[1].layers, strict=True):
        assert layer.seen == other.seen
        assert layer.state.keys() == other.state.keys()
        assert all(torch.equal(x, other.state[name]) for name, x in layer.state.items())


@pytest.mark.parametrize("eighths", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"far_rope": False},
        {"far_rope": False, "kv_dtype": "int8", "state_dtype": "bfloat16"},
        {"sinks": 0, "far_mass": "none"},
        {"feature_dim": 8, "kv_dtype": "int8", "slots": 3, "slot_dtype": "int4", "slot_score": "learned"},
        {"slots": 2, "kv_dtype": "int8", "slot_score": "attention", "more_slots": 2, "more_heads": (1,)},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])  # with biases, without any, with those of q, k and v alone
def test_a_layer_is_its_parts(
    family: str, changes: dict[str, Any], dtype: torch.dtype, eighths: bool, called: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """One row and three; from the first token that a state is there for, before and after the window is full."""
    model = model_of(family, replace(SPEC, **changes), dtype)
    if eighths:
        quantize(model)
    for rows, first, time in ((1, 1, 14), (3, 12, 16)):
        called.clear()
        ids = texts(rows, time)
        found = read(model, ids, first)
        assert len(called) == LAYERS * (time - first)
        same(found, by_parts(monkeypatch, model, ids, first))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_wide_layers_are_shared_by_threads(threads: int, called: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, none begins before what it reads is there."""
    sizes = {"hidden_size": 192, "intermediate_size": 272, "num_attention_heads": 6, "num_key_value_heads": 3, "mlp_bias": True}
    model = model_of(dtype=torch.bfloat16, **sizes)
    expected = by_parts(monkeypatch, model, texts(1, 12), 2)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = read(model, texts(1, 12), 2)
    finally:
        torch.set_num_threads(before)
    assert len(called) == LAYERS * 10
    same(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slots", [0, 3])
def test_windows_without_a_memory(slots: int, dtype: torch.dtype, called: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"slots": slots, "slot_score": "learned", "slot_dtype": "int4"} if slots else {}
    model = model_of("mistral", replace(SPEC.near_only(), kv_dtype="int8", **more), dtype)
    found = read(model, texts(2, 20), 12)
    assert len(called) == LAYERS * 8
    same(found, by_parts(monkeypatch, model, texts(2, 20), 12))


def test_rows_of_their_own_lengths(called: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each turns by its own angle; a mask of real tokens alone is none."""
    model, ids, mask = model_of(), texts(2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[1, :5] = 0
    found = read(model, ids, 10, mask)
    assert len(called) == LAYERS * 4
    assert called[-1][2][0].shape[0] == 2
    same(found, by_parts(monkeypatch, model, ids, 10, mask))


def test_a_state_is_left_as_it_was(called: Calls) -> None:
    """Unless its cache allows it to be written to; and what a trace is told of the operator is so."""
    model, ids = model_of(), texts(1, 13)
    with torch.no_grad():
        cache = model(ids[:, :12], use_cache=True).past_key_values
        layer = cache.layers[0]
        before = {name: x.clone() for name, x in layer.state.items()}
        held, own = layer.state, copy.deepcopy(cache)
        model(ids[:, 12:], past_key_values=cache, use_cache=True)
        assert all(torch.equal(x, before[name]) for name, x in held.items())
        assert layer.state["far"] is not held["far"]
        for one in own.layers:
            one.in_place = True
        there = own.layers[0].state
        model(ids[:, 12:], past_key_values=own, use_cache=True)
    assert all(own.layers[0].state[name] is there[name] for name in ("k", "v", "far"))
    assert torch.equal(own.layers[0].state["far"], layer.state["far"])
    x, parts, rotation, undone, count, states, (maps, terms, learned, more_of), *rest = called[-1]
    given = (x, *parts, *rotation, undone, count, *states, *maps, *terms, *learned, more_of, *rest)
    plain = tuple(one.detach() if isinstance(one, Tensor) else one for one in given)
    plain = (plain[0], *([y.detach() if isinstance(y, Tensor) else y for y in one] for one in plain[1:6]), *plain[6:])
    torch.library.opcheck(native_operators._made("layer_step"), plain, test_utils=("test_schema", "test_faketensor"))


def hooked(name: str) -> Callable[[Any], Any]:
    return lambda model: model.model.layers[1].get_submodule(name).register_forward_hook(lambda *_: None)


def in_eighths(name: str) -> Callable[[Any], Any]:
    return lambda model: put(model, name, Int8Linear(model.model.layers[1].get_submodule(name)))


def put(model: Any, name: str, value: Any) -> None:
    path, _, attribute = name.rpartition(".")
    setattr(model.model.layers[1].get_submodule(path), attribute, value)


def adapted(model: Any) -> None:
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], layers_to_transform=[1]), model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "change, taken",
    [
        (lambda model: None, 3),
        *((in_eighths(name), 3) for name in ("self_attn.o_proj", "self_attn.k_proj", "mlp.up_proj")),
        *((hooked(name), 2) for name in ("mlp", "self_attn", "self_attn.q_proj", "self_attn.linearize", "input_layernorm")),
        (hooked(""), 3),  # of the layer itself
        (lambda model: put(model, "self_attn.linearize.forward", model.model.layers[1].self_attn.linearize.forward), 2),
        (lambda model: put(model, "mlp.down_proj.forward", model.model.layers[1].mlp.down_proj.forward), 2),
        (lambda model: put(model, "mlp.act_fn", nn.GELU()), 2),
        (adapted, 2),
        (lambda model: [layer.half() for layer in model.model.layers[1:2]], None),
    ],
)  # fmt: skip
def test_who_has_changed_a_layer_keeps_its_parts(
    change: Callable[[Any], Any], taken: int | None, dtype: torch.dtype, called: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = model_of("mistral", dtype=dtype), texts(1, 10)
    change(model)
    if taken is None:  # numbers of two kinds, which PyTorch refuses
        with pytest.raises(RuntimeError, match="dtype"):
            read(model, ids, 9)
        return
    found = read(model, ids, 9)
    assert len(called) == taken
    same(found, by_parts(monkeypatch, model, ids, 9))


@pytest.mark.parametrize("family", ["qwen3", "olmo2", "gemma2", "granite", "gpt_neox", "phi3", "mixtral", "cohere2"])
def test_families_whose_layers_are_others(family: str, called: Calls) -> None:
    """Norms of queries and keys, norms after the mixer, factors of what is added, gates of other kinds."""
    model = convert_model(
        tiny_family(family, **{"head_dim": 32} if family in ("qwen3", "gemma2", "cohere2") else {}), method="default"
    )
    read(model, texts(1, 4), 2)
    assert not called


def test_each_layer_is_asked_by_itself(called: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of these does not turn its queries and keys."""
    model = model_of("smollm3", hidden_size=128, head_dim=32)
    found = read(model, texts(1, 6), 5)
    assert len(called) == 2
    same(found, by_parts(monkeypatch, model, texts(1, 6), 5))


def test_calls_that_are_not_one_plain_token(called: Calls) -> None:
    """Two tokens, gradients, other modes, halves that are off, caches that record, pads, more rows than kernels take."""
    model, ids = model_of(), texts(2, 12)

    def step(**options: Any) -> None:
        with torch.no_grad():
            cache = model(ids[:, :10], use_cache=True).past_key_values
            for layer in cache.layers if options.pop("record", False) else ():
                layer.activate_past_recording()
        model(ids[:, 10:11], past_key_values=cache, use_cache=True, **options)

    step()
    with torch.no_grad():
        step(record=True)
        step(attention_mask=torch.tensor([[1] * 11, [1] * 10 + [0]]))
        with ablated(model, "far"):
            step()
        with mode(model, "teacher"):
            model(ids[:, :1])
        with mode(model, "observe"):
            model(ids[:, :1])
        read(model, ids[:1].repeat(native_operators.FEW + 1, 1), 11)
        model(ids[:, :1])
        cache = model(ids[:, :10], use_cache=True).past_key_values
        model(ids[:, 10:], past_key_values=cache, use_cache=True)
        assert not called
        step()
    assert len(called) == LAYERS


def test_asking_leaves_no_trace() -> None:
    """A layer keeps its name, for sharding, and can be pickled and copied; weights and random numbers stay as they were."""
    model = model_of()
    layer, before = model.model.layers[0], torch.get_rng_state()
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    assert type(layer).__name__ in model._no_split_modules
    assert type(layer) is pickle.loads(pickle.dumps(type(layer)))
    assert layer.linearize_asked is False
    score = one_layer.asked(layer)
    assert score is not None
    assert score.scale == layer.self_attn.scaling
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert copy.deepcopy(layer).linearize_asked == score
    assert layer.self_attn.linearize_mode == "student"
    assert not layer.linearize_plain
    assert not layer.mlp.linearize_plain
