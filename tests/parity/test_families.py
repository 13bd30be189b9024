"""Every supported family against transformers' own model: near half, untouched layers, checkpoints, generation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from linearize import convert_model
from linearize.conversion.architectures import ARCHITECTURES
from linearize.methods import make
from linearize.modeling.modeling_linearized import attentions, replaced
from linearize.testing.families import tiny_family
from linearize.testing.models import randomise
from linearize.testing.points import HEADLINE

LENGTH, PADS = 23, 6
TOLERANCE = 1e-5  # relative to the largest logit, fp32

family = pytest.mark.parametrize("family", ARCHITECTURES)


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

    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(watch(index), with_kwargs=True)
    model(**inputs, use_cache=False)
    for index in (0, 2):
        args, kwargs, output = seen[index]
        again = base.model.layers[index](*args, **kwargs)
        assert torch.equal(again[0] if isinstance(again, tuple) else again, output)


@family
@pytest.mark.parametrize("layers", ["all", "1"])
@torch.no_grad()
def test_saved_and_loaded(family: str, layers: str, tmp_path: Path) -> None:
    model, inputs = converted(tiny_family(family), layers=layers, window=4), batch()
    model.save_pretrained(tmp_path)
    expected = model(**inputs).logits
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(loaded.eval()(**inputs).logits, expected)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again(**inputs).logits, expected)


@family
@pytest.mark.parametrize("method, layers", [*((name, "all") for name in HEADLINE), ("default", "1")])
@torch.no_grad()
def test_generation_with_and_without_cache(family: str, method: str, layers: str) -> None:
    known = {option["key"] for option in make(method).options()}
    options = {key: value for key, value in {"window": 4, "sinks": 2}.items() if key in known}
    model, inputs = converted(tiny_family(family), method, layers, **options), batch()
    asked = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "max_new_tokens": 24, "do_sample": False}
    cached = model.generate(**asked, use_cache=True)
    assert cached.shape == (2, LENGTH + 24)
    assert torch.equal(cached, model.generate(**asked, use_cache=False))
    row = model.generate(inputs["input_ids"][1:, PADS:], max_new_tokens=24, do_sample=False)
    assert torch.equal(row[0], cached[1, PADS:])
