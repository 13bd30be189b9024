"""Training steps and what they are compared to: attention transfer, LoRA on student and on the unconverted model, bare passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from linearize import text
from linearize.conversion.calibration import few_logits
from linearize.distillation import lora
from linearize.distillation.loop import Task, make_accelerator
from linearize.distillation.run import stages_for
from linearize.distillation.sharding import make_optimizer
from linearize.distillation.stages import AttentionTransfer, LogitDistillation, lora_parameters, mixer_parameters
from linearize.documents import BUILTIN, documents
from linearize.errors import InputError
from linearize.methods.base import ATTENTION, LORA, Stage
from linearize.recipe import recipe_of

LOSS = "kl"  # of stage lora, for student and unconverted model alike
Run = Callable[[], object]


@dataclass
class Step:
    """One step of a stage on the same rows again: gradients, then `update`. The rate is zero, so that nothing moves."""

    task: Task
    parameters: list[nn.Parameter]
    ids: Tensor
    positions: Tensor

    def __post_init__(self) -> None:
        self.optimizer = make_optimizer([{"params": self.parameters, "lr": 0.0}], sharded=False)

    def __call__(self) -> None:
        self.backward()
        self.update()

    def backward(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.task.backward(self.ids, self.positions)

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()


def stage_of(model: Any, kind: str) -> Stage | None:
    """The stage of the method's own curriculum, LoRA's with the loss that an unconverted model can have too; None: it has none."""
    stages = recipe_of(method=model.config.linearize["method"]).stages
    if all(stage.kind != kind for stage in stages):
        return None
    (found,) = stages_for(recipe_of(method=model.config.linearize["method"]), kind)
    return replace(found, loss=LOSS, far_weight=1.0) if kind == LORA else found


def in_order(ids: Tensor) -> Tensor:
    """Positions (B, T) of rows that are one document each."""
    return torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)


def teacher_pass(teacher: Any, ids: Tensor) -> Run:
    """The stock model over rows of one document each, logits of the last token alone: what stage attention needs of it."""

    def run() -> None:
        with torch.no_grad():
            teacher(input_ids=ids, use_cache=False, **few_logits(teacher))

    return run


def training(parameters: Mapping[str, nn.Parameter]) -> list[nn.Parameter]:
    for p in parameters.values():
        p.requires_grad_(True)
    return list(parameters.values())


def attention_step(model: Any, ids: Tensor, positions: Tensor | None = None) -> Step:
    """A step of attention transfer. InputError where the method has none."""
    stage = stage_of(model, ATTENTION)
    model.requires_grad_(False)
    parameters = training(mixer_parameters(model))
    if stage is None or not parameters:
        method = model.config.linearize["method"]
        raise InputError(f"method {method} has no stage attention, or nothing to train in it", "--stage", "--stage lora")
    return Step(AttentionTransfer(model, stage), parameters, ids, in_order(ids) if positions is None else positions)


def packed_rows(tokenizer: Any, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A row (1, T) of the built-in text, with its positions: as distill reads it, several documents where they are short."""
    rows = text.pack(text.tokenise(tokenizer, documents(BUILTIN), limit=2 * length), length)
    return rows.ids[:1].to(device), rows.positions[:1].to(device)


def with_adapter(model: Any, stage: Stage) -> tuple[Any, list[nn.Parameter]]:
    """The model with LoRA on its layers, and what is trained: the adapter, and the mixers where the stage says so."""
    model.requires_grad_(False)
    adapted = lora.add_adapter(model, stage, seed=0)
    own = lora_parameters(adapted) | (mixer_parameters(adapted) if stage.mixer_lr else {})
    return adapted, training(own)


def lora_step(adapted: Any, parameters: list[nn.Parameter], stage: Stage, ids: Tensor) -> Step:
    """A step of LoRA against the same model without adapter and mixers: of a student, or of a model that has no mixers."""
    accelerator = make_accelerator("cpu" if ids.device.type == "cpu" else "auto")
    return Step(LogitDistillation(accelerator, adapted, adapted, stage, None), parameters, ids, in_order(ids))


def there_and_back(adapted: Any, ids: Tensor) -> Run:
    """A forward and a backward pass over a row, with the logits of its last token alone."""
    model = adapted.get_base_model()  # what peft puts around it does not say which arguments it takes

    def run() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, use_cache=False, **few_logits(model)).logits.float().square().mean().backward()

    return run
