"""LoRA on the projections of the converted layers, through peft: the only module that imports it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from linearize.conversion.architectures import ARCHITECTURES, SEPARATE
from linearize.errors import UsageError
from linearize.methods.base import Stage
from linearize.modeling.modeling_linearized import PREFIX
from linearize.modeling.plans import is_causal

ALPHA_PER_RANK = 2


def add_adapter(model: Any, stage: Stage, seed: int) -> Any:
    """A peft model whose adapters sit on the stage's targets (q, k, v, o by default) of every converted layer."""
    import torch

    modules = [layer["module"] for layer in model.config.linearize["layers"]]
    known = projections(model)
    check_targets(stage, model)
    names = list(dict.fromkeys(f"{module}.{known[letter]}" for module in modules for letter in stage.targets or known))
    task = "CAUSAL_LM" if is_causal(model.config.linearize) else None  # peft has none for masked language models
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


def projections(model: Any) -> dict[str, str]:
    """Letters and names of the projections of a model's attention; of a family that has no entry those with the usual names."""
    if family := ARCHITECTURES.get(model.config.model_type.removeprefix(PREFIX)):
        return dict(family.projections)
    there = {name for name, _ in model.get_submodule(model.config.linearize["layers"][0]["module"]).named_children()}
    return {letter: name for letter, name in SEPARATE.items() if name in there}


def check_targets(stage: Stage, model: Any) -> None:
    """UsageError for a target that is no projection of attention, an output head above all."""
    known, where = projections(model), f"stages.{stage.kind}.targets"
    for letter in stage.targets:
        if letter in known:
            continue
        head = model.get_output_embeddings()
        if head is not None and letter in ("head", *(name for name, module in model.named_modules() if module is head)):
            tied = ", tied to the input embedding" if model.config.get_text_config().tie_word_embeddings else ""
            raise UsageError(f"'{letter}' is the output head{tied}: it takes no adapter", where, _letters(known))
        raise UsageError(f"no projection '{letter}'", where, _letters(known))


def _letters(known: Mapping[str, str]) -> str:
    fused = sorted({name for name in known.values() if list(known.values()).count(name) > 1})
    note = f" ({', '.join(fused)} holds {''.join(letter for letter in known if known[letter] in fused)} in one)" if fused else ""
    return f"any of {', '.join(known)}{note}"


def save_adapter(model: Any, directory: Path, base: Path) -> None:
    """The adapter alone, in peft's own format; `base` is the checkpoint that it belongs to, of which its name is noted."""
    model.peft_config["default"].base_model_name_or_path = base.name
    model.save_pretrained(str(directory), save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)  # peft's card has nothing but gaps


def attach(model: Any, directory: Path) -> Any:
    """A peft model of a checkpoint and an adapter that was kept apart."""
    return PeftModel.from_pretrained(model, str(directory))


def like(model: Any, other: Any) -> Any:
    """`model` with adapters of the same places and sizes as the peft model `other` has, not yet of the same values."""
    return get_peft_model(model, other.peft_config["default"], autocast_adapter_dtype=True)


def without(model: Any) -> Any:
    """The model with its adapters taken off."""
    return model.unload()


def merge(model: Any) -> Any:
    """The model with its adapters added into the weights; non-finite results are refused by peft (safe_merge)."""
    return model.merge_and_unload(safe_merge=True)
