"""Encoders against transformers' own: the softmax observed, padding, packing, untouched layers, checkpoints, training, refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import difference, learns
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

from linearize import convert_model
from linearize.conversion.architectures import ARCHITECTURES
from linearize.conversion.detection import verdict
from linearize.distillation.layer_losses import LAYER_LOSSES, LayerCall
from linearize.errors import UnsupportedError
from linearize.modeling.modeling_linearized import attentions, mode, observed
from linearize.modeling.stream import Inputs
from linearize.serving.generate import Generator
from linearize.testing.families import ENCODERS, tiny_family
from linearize.testing.models import randomise

LENGTH = 23
TOLERANCE = 1e-5  # relative to the largest logit, fp32
HEADS = {"masked": AutoModelForMaskedLM, "classes": AutoModelForSequenceClassification}
MASKS = {
    "right": ["11111111111111111111111", "11111111111111111000000"],
    "holes": ["11111011100111111111110", "01111111111100000000000"],
    "a row of pads": ["11111111111111111111111", "00000000000000000000000"],
}

family = pytest.mark.parametrize("family", ENCODERS)
head = pytest.mark.parametrize("head", HEADS)
method = pytest.mark.parametrize("method", ["hedgehog", "t2r"])


def batch(mask: str = "right") -> dict[str, Tensor]:
    ids = torch.randint(2, 97, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.tensor([[int(x) for x in row] for row in MASKS[mask]])}


def converted(base: Any, method: str = "hedgehog", layers: str = "all") -> Any:
    """A converted copy, every new parameter moved away from its start."""
    model = convert_model(copy.deepcopy(base), method=method, layers=layers)
    for attention in attentions(model):
        randomise(attention.linearize)
    return model


@family
@pytest.mark.parametrize("mask", MASKS)
@torch.no_grad()
def test_the_observed_teacher_is_the_original(family: str, mask: str) -> None:
    base, inputs = tiny_family(family), batch(mask)
    expected, model = base(**inputs).logits, converted(base)
    assert difference(model(**inputs).logits, expected, inputs["attention_mask"]) > 1e-3, "nothing was converted"
    for way in ("observe", "teacher"):
        with mode(model, way):
            assert difference(model(**inputs).logits, expected, inputs["attention_mask"]) < TOLERANCE, way


@family
@method
@torch.no_grad()
def test_padding_and_packing(family: str, method: str) -> None:
    """A padded row is the row alone; documents of one row are the same documents apart."""
    model, inputs = converted(tiny_family(family), method).double(), batch()
    first = model.config.linearize["first_position"]
    ids, real = inputs["input_ids"], int(inputs["attention_mask"][1].sum())
    alone = model(ids[1:, :real]).logits
    assert torch.allclose(model(**inputs).logits[1:, :real], alone, atol=1e-12)
    cuts = (9, 1, LENGTH - 10)
    positions = torch.cat([torch.arange(cut) + first for cut in cuts])[None]
    packed = model(ids[:1], position_ids=positions).logits
    apart = torch.cat([model(piece).logits for piece in ids[:1].split(cuts, dim=1)], dim=1)
    assert torch.allclose(packed, apart, atol=1e-12)


@family
@torch.no_grad()
def test_untouched_layers_are_bit_equal(family: str) -> None:
    base, inputs = tiny_family(family), batch()
    model = converted(base, layers="1")
    found, expected = (m(**inputs, output_hidden_states=True).hidden_states for m in (model, base))
    assert torch.equal(found[1], expected[1])
    assert not torch.allclose(found[2], expected[2])
    with mode(model, "teacher"):
        assert torch.equal(model(**inputs).logits, base(**inputs).logits)


@family
@head
@method
def test_saved_loaded_and_trained(family: str, head: str, method: str, tmp_path: Path) -> None:
    model, inputs = converted(tiny_family(family, auto=HEADS[head]), method), batch()
    model.save_pretrained(tmp_path)
    loaded, info = HEADS[head].from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)
    learns(loaded, inputs)


def test_a_masked_model_becomes_a_classifier(tmp_path: Path) -> None:
    """As transformers does it: the head is new, the converted body is not."""
    model = converted(tiny_family("bert"))
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert all(name.startswith(("classifier", "bert.pooler")) for name in info["missing_keys"])
    own, other = (attentions(m)[2].linearize.map_q.weight for m in (loaded, model))
    assert torch.equal(own, other)
    assert loaded(**batch()).logits.shape == (2, 3)


@pytest.mark.parametrize("padded", [True, False])
def test_the_weights_loss_sees_both_sides(padded: bool) -> None:
    """Hedgehog's cross-entropy is least, the teacher's own entropy, where the weights are the teacher's: here both are uniform."""
    model, inputs = converted(tiny_family("bert")), batch()
    given = inputs if padded else {"input_ids": inputs["input_ids"]}
    with torch.no_grad():
        for attention in attentions(model):
            for module in (attention.query, attention.key):
                module.weight.zero_()
                module.bias.zero_()
    seen: list[float] = []
    loss = LAYER_LOSSES["weights"]

    def see(attention: Any, inputs: Inputs, target: Tensor) -> None:
        seen.append(float(loss(LayerCall(attention.linearize, inputs, target))))

    with torch.no_grad(), observed(model, see), mode(model, "observe"):
        model(**given)
    expected = 0.0 if padded else float(torch.tensor(float(LENGTH)).log())  # with pads it is the relative output error
    assert torch.allclose(torch.tensor(seen), torch.tensor(expected), atol=1e-5)


class Signs(Dataset):
    """Rows of one token of two, between others: the class says which."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(10, 97, (12,), generator=torch.Generator().manual_seed(index))
        ids[index % 12] = 5 + index % 2
        mask = (torch.arange(12) < 12 - index % 3).long() | (torch.arange(12) <= index % 12).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(index % 2)}


@family
def test_a_classifier_trains_under_trainer(family: str, tmp_path: Path) -> None:
    """Hedgehog's finetuned conversion: all weights, on the task."""
    model = converted(tiny_family(family, auto=AutoModelForSequenceClassification))
    settings = {"max_steps": 10, "learning_rate": 3e-3, "per_device_train_batch_size": 16, "logging_steps": 1}
    arguments = TrainingArguments(str(tmp_path), report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, **settings)
    trainer = Trainer(model=model, args=arguments, train_dataset=Signs())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0], losses
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in model.parameters())


@torch.no_grad()
def test_learned_positions_end() -> None:
    for name, longest in (("bert", 32), ("roberta", 30)):  # RoBERTa's begin after its pad's
        model = converted(tiny_family(name, max_position_embeddings=32))
        ids = torch.randint(2, 97, (1, longest + 1))
        assert model(ids[:, :longest]).logits.shape[1] == longest
        with pytest.raises(ValueError, match=f"learned positions for {longest} tokens"):
            model(ids)


@pytest.mark.parametrize(
    "method, reason",
    [("default", "merge 'denominator'"), ("liger", "merge 'sum'"), ("window", "merge 'near'"), ("gated-deltanet", "rule 'delta'"),
     ("retnet", "decay 'fixed'"), ("gla", "decay"), ("mom", "rule|experts|decay"), ("hedgehog,default", "merge")],
)  # fmt: skip
def test_methods_that_suppose_an_order(method: str, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason) as refusal:
        convert_model(tiny_family("bert"), method=method)
    assert "hedgehog" in refusal.value.fix


def test_what_is_no_encoder_of_ours() -> None:
    with pytest.raises(UnsupportedError, match="BertForTokenClassification"):
        convert_model(tiny_family("bert", auto=AutoModelForTokenClassification), method="hedgehog")
    assert verdict({"model_type": "bert", "is_decoder": True}).status == "refused"
    assert {verdict({"model_type": name}).status for name in ENCODERS} == {"limits"}
    assert {"bert", "distilbert", "electra", "roberta"} <= {name for name, a in ARCHITECTURES.items() if not a.causal}


def test_a_generator_refuses_it() -> None:
    with pytest.raises(UnsupportedError, match="predict the next token"):
        Generator(converted(tiny_family("bert")), None)


def test_masks_of_another_form_are_refused() -> None:
    model, ids = converted(tiny_family("bert")), batch()["input_ids"]
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(2, 1, LENGTH, LENGTH))
