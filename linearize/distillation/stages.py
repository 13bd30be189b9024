"""The two kinds of stage: attention transfer layer by layer, and LoRA against the teacher's logits."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from linearize.conversion.calibration import few_logits
from linearize.distillation.guard import drawn
from linearize.distillation.losses import LAYER_LOSSES, ce, kl
from linearize.methods.base import Stage
from linearize.modeling.attention import LinearizedAttention
from linearize.modeling.mixer import Inputs
from linearize.modeling.modeling_linearized import mode, observed

if TYPE_CHECKING:
    from accelerate import Accelerator

HIDDEN_SHARE = 0.15  # of the tokens, as in BERT (Devlin et al. 2019)


def mixer_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The new parameters, by name."""
    return {name: p for name, p in model.named_parameters() if ".linearize." in name}


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def first_position(model: Any) -> int:
    """The learned position of a text's first token."""
    return int(model.config.linearize.get("first_position") or 0)


class AttentionTransfer:
    """Each mixer learns its layer's attention on the teacher's own inputs: one backward pass a layer, freed at once."""

    def __init__(self, model: nn.Module, stage: Stage) -> None:
        self.model, self.loss = model, LAYER_LOSSES[stage.loss]
        self.by_layer: dict[int, float] = {}

    def backward(self, ids: Tensor, positions: Tensor) -> float:
        """Adds the gradients of every mixer; returns the mean loss over layers."""
        self.by_layer = {}
        with torch.no_grad(), observed(self.model, self._observe), mode(self.model, "observe"):
            self.read(ids, positions)
        return sum(self.by_layer.values()) / len(self.by_layer)

    def read(self, ids: Tensor, positions: Tensor) -> None:
        """Run the teacher, under observation, over rows (B, T)."""
        self.model(input_ids=ids, position_ids=positions + first_position(self.model), **few_logits(self.model))

    def _observe(self, attention: LinearizedAttention, inputs: Inputs, target: Tensor) -> None:
        # what a layer draws does not depend on which layers run before it
        with torch.enable_grad(), drawn(inputs.q.device, torch.initial_seed(), attention.linearize_index):
            loss = self.loss(attention.linearize, inputs, target)
            if loss.requires_grad:
                loss.backward()
        self.by_layer[attention.linearize_index] = float(loss.detach())


class LogitDistillation:
    """The whole student against its teacher: the same network with mixers and adapters switched off.

    A decoder predicts the next token; an encoder, for which `mask_token` is given, the tokens that it hides.
    """

    by_layer: Mapping[int, float] = MappingProxyType({})

    def __init__(self, accelerator: Accelerator, wrapped: nn.Module, model: Any, stage: Stage, mask_token: int | None) -> None:
        self.accelerator, self.wrapped, self.model, self.stage = accelerator, wrapped, model, stage
        self.mask_token = mask_token
        # transformers' own encoders do not tell packed documents apart, the teacher under observation does
        self.teacher = "teacher" if mask_token is None else "observe"
        self.options = {"use_cache": False} if mask_token is None else {}

    def backward(self, ids: Tensor, positions: Tensor) -> float:
        """Loss by the global number of target tokens; adds the gradients; returns this process's share of the loss."""
        inputs, targets, counted = self.task(ids, positions)
        positions = positions + first_position(self.model)
        tokens = counted.sum().clamp(min=1)
        share = self.accelerator.reduce(tokens.float(), "mean")
        teacher = None
        if self.stage.loss == "kl":
            with torch.no_grad(), self._without_adapters(), mode(self.model, self.teacher):
                teacher = self.model(input_ids=inputs, position_ids=positions, **self.options).logits[counted]
        student = self.wrapped(input_ids=inputs, position_ids=positions, **self.options).logits[counted]
        targets = targets[counted]
        loss = ce(student, targets) * (self.stage.ce_weight if teacher is not None else 1.0)
        if teacher is not None:
            loss = loss + kl(student, teacher)
        loss = loss / share
        self.accelerator.backward(loss)
        return float(loss.detach())

    def task(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the model reads, what it is to say at each token, and which tokens count, each (B, T)."""
        if self.mask_token is None:
            return ids, ids.roll(-1, 1), torch.nn.functional.pad(positions[:, 1:] > 0, (0, 1))
        draw = torch.Generator().manual_seed(int(ids.sum()))  # a row hides the same tokens each time, on any device
        hidden = (torch.rand(ids.shape, generator=draw).to(ids.device) < HIDDEN_SHARE) & (positions > 0)
        return ids.masked_fill(hidden, self.mask_token), ids, hidden

    def _without_adapters(self) -> AbstractContextManager[Any]:
        return self.model.disable_adapter() if hasattr(self.model, "disable_adapter") else nullcontext()
