"""Every supported family of decoders against transformers' own model: near half, untouched layers, checkpoints, generation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from linearize import convert_model
from linearize.conversion.architectures import ARCHITECTURES, COMMON
from linearize.conversion.discovery import discover, observe, rope_style
from linearize.distillation.layer_losses import LayerCall, relative_mse
from linearize.methods import make
from linearize.modeling.attention import LinearizedAttention
from linearize.modeling.modeling_linearized import attentions, mode, observed, replaced
from linearize.modeling.stream import Inputs
from linearize.testing.families import DECODERS, tiny_family
from linearize.testing.models import randomise

LENGTH, PADS, STEPS = 23, 6, 5
METHODS = ("default", "hedgehog", "liger", "lawcat", "gated-deltanet")
TOLERANCE = 1e-5  # relative to the largest logit, fp32
TURNED = 1e-4  # where angles in fp32 are turned there and back

# every day: all families with the default, and those that differ most in their attention with every method
DISTINCT = ("llama", "gemma3_text", "gpt2", "gpt_neox", "phi3")
MATRIX = [
    pytest.param(family, method, layers, marks=() if method == "default" or family in DISTINCT else pytest.mark.exhaustive)
    for family in DECODERS
    for method, layers in [*((name, "all") for name in METHODS), ("default", "1")]
]

family = pytest.mark.parametrize("family", DECODERS)


def batch() -> dict[str, Tensor]:
    """Two rows, the second left-padded, with the positions of their real tokens."""
    ids = torch.randint(2, 97, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :PADS] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def difference(found: Tensor, expected: Tensor, mask: Tensor) -> float:
    real = mask.bool()
    return float((found[real] - expected[real]).abs().max() / expected[real].abs().max())


def converted(base: Any, method: str = "default", layers: str = "all", **options: Any) -> Any:
    """A converted copy, every new parameter moved away from its start."""
    model = convert_model(copy.deepcopy(base), method=method, layers=layers, options=options)
    for attention in attentions(model):
        randomise(attention.linearize)
    return model


@family
@torch.no_grad()
def test_a_window_over_everything_is_softmax(family: str) -> None:
    base, inputs = tiny_family(family), batch()
    expected = base(**inputs).logits
    model = converted(base, window=LENGTH)
    with replaced(model, make("default", {"window": LENGTH}).point().near_only()):
        assert difference(model(**inputs).logits, expected, inputs["attention_mask"]) < TOLERANCE
        alone = model(inputs["input_ids"][:1]).logits
    assert difference(alone, expected[:1], inputs["attention_mask"][:1]) < TOLERANCE


@family
@pytest.mark.parametrize("method", ["default", "lolcats"])
@torch.no_grad()
def test_an_empty_far_half_has_no_weight(family: str, method: str) -> None:
    base, inputs = tiny_family(family), batch()
    model = converted(base, method, window=LENGTH)
    assert difference(model(**inputs).logits, base(**inputs).logits, inputs["attention_mask"]) < TOLERANCE


@family
@torch.no_grad()
def test_the_far_half_is_seen(family: str) -> None:
    """The comparisons above would pass if nothing had been converted."""
    base, inputs = tiny_family(family), batch()
    logits = converted(base, window=4)(**inputs).logits
    assert difference(logits, base(**inputs).logits, inputs["attention_mask"]) > 1e-3


@family
@torch.no_grad()
def test_untouched_layers_are_bit_equal(family: str) -> None:
    base, inputs = tiny_family(family), batch()
    model = converted(base, layers="1", window=4)
    seen: dict[int, tuple[Any, Any, Tensor]] = {}

    def watch(index: int) -> Any:
        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            seen[index] = (args, kwargs, output[0] if isinstance(output, tuple) else output)

        return hook

    layer_path = ARCHITECTURES[family].attention.rpartition(".")[0]
    for index in range(3):
        model.get_submodule(layer_path.format(index)).register_forward_hook(watch(index), with_kwargs=True)
    model(**inputs, use_cache=False)
    for index in (0, 2):
        args, kwargs, output = seen[index]
        again = base.get_submodule(layer_path.format(index))(*args, **kwargs)
        assert torch.equal(again[0] if isinstance(again, tuple) else again, output)


@family
@torch.no_grad()
def test_the_observed_teacher_is_the_original(family: str) -> None:
    """Its own softmax, with sliding windows shorter than the text, softcaps and learned sinks, though no T x T tensor is made."""
    base, inputs = tiny_family(family, sliding_window=8), batch()
    model = converted(base, window=4)
    with mode(model, "observe"):
        assert difference(model(**inputs).logits, base(**inputs).logits, inputs["attention_mask"]) < TOLERANCE
    with mode(model, "teacher"):
        assert difference(model(**inputs).logits, base(**inputs).logits, inputs["attention_mask"]) < TOLERANCE


@family
def test_the_registry_says_what_a_probe_finds(family: str) -> None:
    base, entry = tiny_family(family), ARCHITECTURES[family]
    config = base.config.to_dict()
    ids = torch.randint(2, 97, (1, 12))
    base.set_attn_implementation("eager")
    logits, calls = observe(base, ids)
    assert torch.equal(logits, base(ids).logits), "the attention interface gives other logits"
    names = {module: name for name, module in base.named_modules()}
    assert [names[module] for module in calls] == [entry.attention.format(i) for i in range(3)]
    assert [rope_style(module, call) for module, call in calls.items()] == [entry.rope_of(config, i) for i in range(3)]
    types = getattr(base.config, "layer_types", None) or ["full_attention"] * 3
    assert [window is not None for window in entry.sliding(config)] == [kind == "sliding_attention" for kind in types]
    if "intermediate_size" in entry.keys:  # which transformers does not map, so that the probe cannot find it
        layer = base.get_submodule(entry.attention.rpartition(".")[0].format(0))
        assert any(entry.mlp_width(config) in p.shape for p in layer.parameters())
    if not entry.unrotated:
        found = discover(config, family)
        assert (found.attention, found.cache, found.projections, found.rope) == (
            entry.attention, entry.cache, entry.projections, entry.rope,
        )  # fmt: skip
        assert {key: name for key, name in entry.keys.items() if key in COMMON} == {
            key: name for key, name in found.keys.items() if key in entry.keys
        }


@pytest.mark.parametrize("family, method, layers", MATRIX)
def test_with_every_method(family: str, method: str, layers: str, tmp_path: Path) -> None:
    """Saved and loaded, decoded with and without a cache, padded and alone, and one step of training."""
    known = {option["key"] for option in make(method).options()}
    options = {key: value for key, value in {"window": 4, "sinks": 2}.items() if key in known}
    model, inputs = converted(tiny_family(family), method, layers, **options), batch()
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)
    decodes_alike(loaded, inputs)
    learns(loaded, inputs)


def decodes_alike(model: Any, inputs: dict[str, Tensor]) -> None:
    ids, mask, asked = inputs["input_ids"], inputs["attention_mask"], {"max_new_tokens": STEPS, "do_sample": False}
    cached = model.generate(ids, attention_mask=mask, **asked)
    assert cached.shape == (2, LENGTH + STEPS)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **asked))
    row = model.generate(ids[1:, PADS:], **asked)
    assert torch.equal(row[0], cached[1, PADS:])


def learns(model: Any, inputs: dict[str, Tensor]) -> None:
    """A step against the teacher's own outputs lowers the loss of the same batch."""
    seen: list[tuple[LinearizedAttention, Inputs, Tensor]] = []
    with torch.no_grad(), observed(model, lambda *call: seen.append(call)), mode(model, "observe"):
        model(**inputs)
    parameters = [p for attention in attentions(model) for p in attention.linearize.parameters()]
    if not parameters:
        return
    optimizer = torch.optim.Adam(parameters, lr=1e-3)

    def loss() -> Tensor:
        return torch.stack([relative_mse(LayerCall(attention.linearize, given, target)) for attention, given, target in seen]).sum()

    before = loss()
    before.backward()
    optimizer.step()
    with torch.no_grad():
        assert loss() < before


@pytest.mark.parametrize("family", [name for name, entry in ARCHITECTURES.items() if not entry.learned_positions])
@torch.no_grad()
def test_a_far_half_without_rope_does_not_know_positions(family: str) -> None:
    """The model's rotation is undone, in its own style: all tokens moved by 7, the logits stay."""
    model, ids = converted(tiny_family(family), "gated-deltanet"), batch()["input_ids"]
    positions = torch.arange(LENGTH).expand_as(ids)
    expected = model(ids, position_ids=positions).logits
    assert difference(model(ids, position_ids=positions + 7).logits, expected, torch.ones_like(ids)) < TURNED


@torch.no_grad()
def test_learned_positions_end() -> None:
    model = converted(tiny_family("gpt2", max_position_embeddings=32), window=4)
    ids = torch.randint(2, 97, (1, 33))
    assert model(ids[:, :32]).logits.shape[1] == 32
    with pytest.raises(ValueError, match="learned positions for 32 tokens"):
        model(ids)


@torch.no_grad()
def test_phi3_keeps_its_state_where_its_rope_changes_tables() -> None:
    end = {"original_max_position_embeddings": 24}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 6, "long_factor": [1.0] * 6, **end}
    base = tiny_family("phi3", rope_parameters=rope, **end)
    model = converted(base, window=4)
    ids = torch.randint(2, 97, (1, 20), generator=torch.Generator().manual_seed(0))
    calls: list[int] = []
    model.model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    model.generate(ids, max_new_tokens=12, do_sample=False)
    assert calls == [20, *[1] * 11]


@pytest.mark.parametrize("model_type", ["arcee", "glm", "nemotron", "olmoe", "seed_oss"])
@torch.no_grad()
def test_a_family_that_the_registry_does_not_know(model_type: str) -> None:
    base, inputs = tiny_family(model_type), batch()
    model = converted(base, window=LENGTH)
    assert difference(model(**inputs).logits, base(**inputs).logits, inputs["attention_mask"]) < TOLERANCE
