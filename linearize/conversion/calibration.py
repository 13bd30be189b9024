"""Starting the mixers: the teacher runs once over a few sequences, and each layer's mixer is started as its inputs pass by."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from linearize.methods.calibration import Calibration, relative_error
from linearize.modeling.attention import LinearizedAttention
from linearize.modeling.mixer import Inputs, Mixer
from linearize.modeling.modeling_linearized import mode, observed


def few_logits(model: nn.Module) -> dict[str, int]:
    """The argument that spares a decoder the logits that nobody reads; an encoder has none."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def calibrate(
    model: nn.Module, ids: Tensor, start: Callable[[int, Mixer, Calibration], None], report: Callable[[int, float], None]
) -> list[float]:
    """Run the teacher over ids (B, T); returns each layer's relative error after its start."""
    errors: list[float] = []

    def observe(attention: LinearizedAttention, inputs: Inputs, target: Tensor) -> None:
        start(attention.linearize_index, attention.linearize, Calibration(inputs, target))
        output, _ = attention.linearize(inputs)
        errors.append(float(relative_error(output, target).mean()))
        report(len(errors), errors[-1])

    with torch.no_grad(), observed(model, observe), mode(model, "observe"):
        model(ids, **few_logits(model))
    return errors
