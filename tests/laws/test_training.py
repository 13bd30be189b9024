"""A converted model trains like any other: by hand, under transformers' Trainer, with peft's LoRA, and from a cold start."""

from __future__ import annotations

import inspect
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.utils.data import Dataset
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from linearize.distillation.stages import learnt_parameters
from linearize.modeling.modeling_linearized import ablated, attentions
from linearize.modeling.spec import MixerSpec
from linearize.testing import linearized, method_points, own_points, pairwise_points, tiny_llama
from linearize.testing.points import REPRESENTATIVE

POINTS = {p.id: p.spec for p in method_points()}
PUBLISHED = {name: own_points()[name] for name in REPRESENTATIVE}
each_method = pytest.mark.parametrize("spec", PUBLISHED.values(), ids=PUBLISHED)
MIXERS = ["linearize"]


class Repeats(Dataset):
    """Rows that say four tokens again and again; the last is shorter, so that a batch needs pads or packing."""

    def __init__(self, padded: bool) -> None:
        rows = torch.randint(2, 64, (4, 4), generator=torch.Generator().manual_seed(0)).repeat(8, 4)
        self.rows = [row[: 16 - 3 * (i % 2)] for i, row in enumerate(rows)]
        self.padded = padded

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index]
        if not self.padded:
            return {"input_ids": row}
        pads = 16 - len(row)
        return {
            "input_ids": torch.nn.functional.pad(row, (0, pads)),
            "attention_mask": torch.nn.functional.pad(torch.ones_like(row), (0, pads)),
            "labels": torch.nn.functional.pad(row, (0, pads), value=-100),
        }


def losses(model: Any, folder: Path, packed: bool = False, **options: Any) -> list[float]:
    settings = {"max_steps": 12, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "logging_steps": 1, **options}
    arguments = TrainingArguments(str(folder), report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, **settings)
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True) if packed else None
    trainer = Trainer(model=model, args=arguments, train_dataset=Repeats(not packed), data_collator=collator)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@cache
def plain(kv_heads: int) -> Any:
    return tiny_llama(kv_heads)


def fresh(spec: MixerSpec, kv_heads: int = 2) -> Any:
    return linearized(plain(kv_heads), spec).train()


def new_parameters(model: Any) -> dict[str, Tensor]:
    return {name: x for name, x in model.named_parameters() if ".linearize." in name}


@pytest.mark.parametrize("spec", [*POINTS.values(), *(p.spec for p in pairwise_points())])
def test_gradients_reach_every_parameter(spec: MixerSpec) -> None:
    """Also where batches have pads; the numbers themselves are law 1's."""
    model = fresh(spec)
    batch = torch.utils.data.default_collate([Repeats(True)[i] for i in range(4)])
    model(**batch).loss.backward()
    keyless = spec.gate_key == "complement" and spec.decay != "key" and not spec.has_near  # HGRN2 writes under its gates alone
    for name, parameter in model.named_parameters():
        if (keyless and "k_proj" in name) or ".slot_score." in name:  # a choice of tokens has no gradient
            continue
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    for name, parameter in learnt_parameters(model).items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("way", ["padded", "packed", "bf16", "checkpointing"])
def test_trainer(way: str, tmp_path: Path) -> None:
    options = {"bf16": {"bf16": True}, "checkpointing": {"gradient_checkpointing": True}}.get(way, {})
    model = fresh(PUBLISHED["default"])
    before = {name: x.clone() for name, x in new_parameters(model).items()}
    seen = losses(model, tmp_path, packed=way == "packed", **options)
    assert seen[-1] < 0.7 * seen[0], seen
    assert all(not torch.equal(x, before[name]) for name, x in new_parameters(model).items())
    assert all(x.dtype == torch.float32 for x in new_parameters(model).values())


@each_method
def test_trainer_on_each_method(spec: MixerSpec, tmp_path: Path) -> None:
    seen = losses(fresh(spec, 4), tmp_path, max_steps=5)
    assert seen[-1] < seen[0], seen


def test_checkpointing_changes_no_gradient() -> None:
    batch = torch.utils.data.default_collate([Repeats(True)[i] for i in range(4)])
    grads = []
    for checkpointing in (False, True):
        model = fresh(PUBLISHED["lawcat"])
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**batch).loss.backward()
        grads.append([x.grad for x in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@torch.no_grad()
def test_lora_at_zero() -> None:
    """Law 8: an adapter that has learnt nothing changes no bit."""
    model, ids = fresh(PUBLISHED["default"]).eval(), Repeats(True)[0]["input_ids"][None]
    before = model(ids).logits
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=MIXERS)).eval()
    assert torch.equal(adapted(ids).logits, before)


@each_method
def test_lora(spec: MixerSpec, tmp_path: Path) -> None:
    """Adapters on the projections, mixers trained whole: only these change; saved, loaded and merged they say the same."""
    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], modules_to_save=MIXERS if _learns(spec) else None)
    model = get_peft_model(fresh(spec), config)
    seen = losses(model, tmp_path, max_steps=5)
    assert seen[-1] < seen[0], seen
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name or "modules_to_save" in name), name
    model.eval().save_pretrained(tmp_path)
    ids = Repeats(True)[0]["input_ids"][None]
    with torch.no_grad():
        expected = model(ids).logits
        again = PeftModel.from_pretrained(fresh(spec), tmp_path).eval()
        assert torch.equal(again(ids).logits, expected)
        merged = again.merge_and_unload()
        assert all(type(a.linearize).__name__ == "Mixer" for a in attentions(merged))
        assert torch.allclose(merged(ids).logits, expected, atol=1e-4)


def test_ablation_reaches_mixers_that_peft_wraps() -> None:
    spec, ids = PUBLISHED["default"], Repeats(True)[0]["input_ids"][None]
    model = fresh(spec).eval()
    wrapped = get_peft_model(fresh(spec), LoraConfig(target_modules=["q_proj"], modules_to_save=MIXERS)).eval()
    with torch.no_grad():
        whole = model(ids).logits
        for half in ("far", "near"):
            with ablated(model, half), ablated(wrapped, half):
                assert not torch.allclose(model(ids).logits, whole)
                assert torch.equal(wrapped(ids).logits, model(ids).logits)
        assert torch.equal(wrapped(ids).logits, whole)


def _learns(spec: MixerSpec) -> bool:
    return any(True for _ in attentions(fresh(spec))[0].linearize.parameters())


def test_forward_says_what_it_takes() -> None:
    """Trainer finds labels in the signature, generate() logits_to_keep; by position they mean what they mean in the base."""
    base, model = plain(2), fresh(PUBLISHED["default"]).eval()
    assert inspect.signature(model.forward) == inspect.signature(base.forward)
    names = list(inspect.signature(base.forward).parameters)
    batch = torch.utils.data.default_collate([Repeats(True)[i] for i in range(4)])
    loss = model(*[batch.get(name) for name in names[: names.index("labels") + 1]]).loss
    assert torch.equal(loss, model(**batch).loss)
    assert model(batch["input_ids"], logits_to_keep=1).logits.shape[1] == 1


def test_evaluation_inside_training(tmp_path: Path) -> None:
    """A cache made in evaluation is not gathered, and training goes on."""
    model = fresh(PUBLISHED["default"])
    arguments = TrainingArguments(str(tmp_path), report_to=[], disable_tqdm=True, use_cpu=True, per_device_eval_batch_size=8)
    found = Trainer(model=model, args=arguments, eval_dataset=Repeats(True)).evaluate()
    assert 0 < found["eval_loss"] < 100
