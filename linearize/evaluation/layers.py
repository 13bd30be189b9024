"""Each layer apart: how far its output is from the teacher's, how much of it is the far memory's, and how errors add up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from linearize.evaluation.reading import Context
from linearize.methods.calibration import relative_error
from linearize.modeling.attention import LinearizedAttention
from linearize.modeling.mixer import Mixer
from linearize.modeling.modeling_linearized import mode, observed
from linearize.modeling.stream import Halves, Inputs
from linearize.modeling.window import Part
from linearize.text import Packed

LENGTH = 1024
COLUMNS = 8  # of positions in the map of errors


def layer_errors(model: Any, host: nn.Module | None, teacher: Context | None, row: Packed) -> list[dict[str, Any]]:
    """For each converted layer, over one row (1, T) cut to 1,024 tokens: `relative_error` of its output, and of each head's.

    On the teacher's own inputs, ||y - y'||^2 / ||y||^2; None once a merge gave the student other projections. `far_share` is
    the far half's part of the weight, `stream` the relative error of the hidden states after the layer by position, when the
    student reads all by itself.
    """
    ids, positions = row.ids[:, :LENGTH].to(model.device), row.positions[:, :LENGTH].to(model.device)
    found: dict[int, dict[str, Any]] = {}

    def observe(attention: LinearizedAttention, inputs: Inputs, target: Tensor) -> None:
        mixer: Mixer = attention.linearize
        halves = mixer.halves(inputs)
        heads = relative_error(mixer(inputs)[0], target)
        share = far_share(mixer, halves)
        same = host is model  # a merged student's projections are not the teacher's: its mixers fit no other inputs
        found[attention.linearize_index] = {
            "index": attention.linearize_index,
            "relative_error": float(heads.mean()) if same else None,
            "heads": heads.tolist() if same else None,
            "far_share": float(share.mean()) if share is not None else None,
        }

    with torch.no_grad(), observed(model, observe), mode(model, "observe"):
        model(input_ids=ids, position_ids=positions, logits_to_keep=1)
    if host is not None and teacher is not None:
        for index, errors in stream_errors(model, host, teacher, ids, positions).items():
            if index in found:
                found[index]["stream"] = errors
    return [found[i] for i in sorted(found)]


def far_share(mixer: Mixer, halves: Halves) -> Tensor | None:
    """The far half's part (B, H, T) in the weights of the merge; None where a layer has one half only."""
    spec, near, far = mixer.spec, halves.near, halves.far
    if near is None or far is None:
        return None
    if spec.merge == "denominator":
        return torch.sigmoid(mixer.far_odds(halves))
    zero, one = torch.zeros_like(far), torch.ones_like(far)  # a sum or a gate: what it makes of a half that is all ones
    ones, zeros = (Part(x * near.denominator[..., None], near.denominator, near.top) for x in (one, zero))
    of_near, of_far = (mixer.combine(Halves(n, f, None, halves.stream)).mean(-1) for n, f in ((ones, zero), (zeros, one)))
    return of_far / (of_near + of_far).clamp(min=1e-12)


def stream_errors(model: Any, host: Any, teacher: Context, ids: Tensor, positions: Tensor) -> dict[int, list[float]]:
    """||h - h'||^2 / ||h||^2 of the hidden states after each layer, in up to 8 equal ranges of positions."""
    with torch.no_grad():
        given = {"input_ids": ids, "position_ids": positions, "use_cache": False, "output_hidden_states": True, "logits_to_keep": 1}
        own = model(**given).hidden_states
        with teacher():
            targets = host(**given).hidden_states
    found = {}
    for index, (h, target) in enumerate(zip(own[1:], targets[1:], strict=True)):
        off = (h - target).float().square().sum((0, 2)).tensor_split(COLUMNS)
        size = target.float().square().sum((0, 2)).tensor_split(COLUMNS)
        found[index] = [float(a.sum() / b.sum().clamp(min=1e-12)) for a, b in zip(off, size, strict=True) if len(a)]
    return found
