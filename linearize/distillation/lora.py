"""LoRA on the projections of the converted layers, through peft: the only module that imports it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from linearize.conversion.architectures import ARCHITECTURES
from linearize.methods.base import Stage
from linearize.modeling.modeling_linearized import PREFIX

ALPHA_PER_RANK = 2


def add_adapter(model: Any, stage: Stage, seed: int) -> Any:
    """A peft model whose adapters sit on the stage's targets (q, k, v, o by default) of every converted layer."""
    import torch

    family = ARCHITECTURES[model.config.model_type.removeprefix(PREFIX)]
    letters = stage.targets or tuple(family.projections)
    names = [f"{layer['module']}.{family.projections[letter]}" for layer in model.config.linearize["layers"] for letter in letters]
    task = "CAUSAL_LM" if family.causal else None  # peft has none for masked language models
    config = LoraConfig(
        r=stage.rank, lora_alpha=ALPHA_PER_RANK * stage.rank, lora_dropout=stage.dropout, target_modules=names, task_type=task
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = get_peft_model(model, config, autocast_adapter_dtype=True)
    for name, module in made.named_modules():  # the model's own dropout stays off, as the teacher's is
        if name.endswith("lora_dropout"):
            module.train()
    return made


def adapter_state(model: Any) -> dict[str, Tensor]:
    return dict(get_peft_model_state_dict(model))


def load_adapter(model: Any, state: dict[str, Tensor]) -> None:
    set_peft_model_state_dict(model, state)


def save_adapter(model: Any, directory: Path) -> None:
    """The adapter alone, in peft's own format."""
    model.save_pretrained(str(directory))


def merge(model: Any) -> Any:
    """The model with its adapters added into the weights; non-finite results are refused by peft (safe_merge)."""
    return model.merge_and_unload(safe_merge=True)
