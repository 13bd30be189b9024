"""Which layers to keep: the cost of each layer's swap, measured one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from linearize.modeling.attention import set_mode
from linearize.modeling.modeling_linearized import attentions, mode
from linearize.progress import Progress, silent

LENGTH = 512


@torch.no_grad()
def swap_costs(model: Any, ids: Tensor, progress: Progress = silent) -> dict[int, float]:
    """KL in nats a token from the teacher to the model with one layer swapped and all others as they were, by layer.

    `ids` (rows, T) are calibration sequences, of which the first 512 tokens count. A ratio of errors inside the layer would
    not do: it says nothing of what the layers after it make of them.
    """
    rows = ids[:, :LENGTH]
    found: dict[int, float] = {}
    modules = attentions(model)
    with mode(model, "observe"):
        teacher = [model(row[None]).logits.float().log_softmax(-1) for row in rows]
        for attention in modules:
            set_mode(attention, "student")
            divergence = [_divergence(expected, model(row[None]).logits) for row, expected in zip(rows, teacher, strict=True)]
            set_mode(attention, "observe")
            found[attention.linearize_index] = sum(divergence) / len(divergence)
            progress("rank", len(found), len(modules), layer=attention.linearize_index, kl=round(divergence[-1], 4))
    return found


def _divergence(expected: Tensor, logits: Tensor) -> float:
    return float(
        torch.nn.functional.kl_div(logits.float().log_softmax(-1), expected, log_target=True, reduction="none").sum(-1).mean()
    )


def dearest(costs: Mapping[int, float], count: int) -> list[int]:
    """The `count` layers whose swap costs most, in order of layer."""
    return sorted(sorted(costs, key=lambda layer: -costs[layer])[:count])
