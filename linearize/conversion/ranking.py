"""Which layers to keep: the cost of each layer's swap, measured one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from linearize.conversion.streaming import RANKED_LENGTH
from linearize.evaluation.perplexity import Variant, compare
from linearize.modeling.attention import LinearizedAttention, set_mode
from linearize.modeling.modeling_linearized import attentions, mode
from linearize.progress import Progress, silent
from linearize.text import Packed


def swap_costs(model: Any, ids: Tensor, progress: Progress = silent) -> dict[int, float]:
    """KL in nats a token from the teacher to the model with one layer swapped and all others as they were, by layer.

    `ids` (rows, T) are calibration sequences, of which the first 512 tokens count. A ratio of errors inside the layer would
    not do: it says nothing of what the layers after it make of them.
    """
    rows = ids[:, :RANKED_LENGTH]
    packed = Packed(rows, torch.arange(rows.shape[1]).expand_as(rows))
    swapped = attentions(model)
    variants = [Variant("teacher", model, lambda: mode(model, "observe"))]
    variants += [Variant(str(a.linearize_index), model, (lambda one: lambda: alone(model, one))(a)) for a in swapped]
    sums = compare(variants, packed, lambda done, total: progress("rank", done, total))
    return {a.linearize_index: s.divergence / s.tokens for a, s in zip(swapped, sums[1:], strict=True)}


@contextmanager
def alone(model: Any, attention: LinearizedAttention) -> Iterator[None]:
    """Run the model with this layer's mixer, and softmax in every other."""
    with mode(model, "observe"):
        set_mode(attention, "student")
        yield


def dearest(costs: Mapping[int, float], count: int) -> list[int]:
    """The `count` layers whose swap costs most, in order of layer."""
    return sorted(sorted(costs, key=lambda layer: -costs[layer])[:count])
