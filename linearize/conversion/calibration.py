"""Starting the mixers: the teacher runs once over a few sequences, and each layer's mixer is started as its inputs pass by."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from linearize.conversion.plan import Plan
from linearize.conversion.streaming import CALIBRATION_LENGTH, CALIBRATION_ROWS, SCORE_LENGTH
from linearize.methods.calibration import Calibration, relative_error
from linearize.methods.slot_fit import fit_slot_score
from linearize.modeling.attention import LinearizedAttention
from linearize.modeling.mixer import Inputs, Mixer
from linearize.modeling.modeling_linearized import mode, observed
from linearize.progress import Progress

SEEDS = 2**62


def few_logits(model: nn.Module) -> dict[str, int]:
    """The argument that spares a decoder the logits that nobody reads; an encoder has none."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def beginnings(every: Calibration, mixer: Mixer) -> Calibration:
    """The part of the calibration that memories start from: the first rows' beginnings.

    Behind slots as many tokens as the longest row has, for few of the first thousand would get there.
    """
    if mixer.spec.scores_learned:
        return every.part(slice(max(SCORE_LENGTH // every.target.shape[1], 1)))
    return every.part(slice(CALIBRATION_ROWS)).first(CALIBRATION_LENGTH)


def start_mixers(
    model: nn.Module, plan: Plan, ids: Tensor, seed: int, device: torch.device, progress: Progress,
    after: Callable[[LinearizedAttention], None] = lambda attention: None,
) -> list[float]:  # fmt: skip
    """Run the teacher over ids (B, T); each layer's mixer is built and started as its inputs pass, then handed to `after`.

    All rows serve to fit the scores by which slots are given away, some of them everything else.
    What a start draws depends on the seed and the layer alone. Returns each layer's relative error.
    """
    seeds = torch.randint(SEEDS, (plan.total,), generator=torch.Generator().manual_seed(seed)).tolist()
    errors: list[float] = []

    def observe(attention: LinearizedAttention, inputs: Inputs, target: Tensor) -> None:
        every, planned = Calibration(inputs, target), attention.linearize
        torch.manual_seed(seeds[attention.linearize_index])
        with torch.device(device):
            mixer = attention.linearize = Mixer(planned.spec, planned.shape)
        mixer.eval()
        fit_slot_score(mixer, every)
        calibration = beginnings(every, mixer)
        if mixer.spec.has_far:
            plan.parts[attention.linearize_index].method.initialise(mixer, calibration)
        output, _ = mixer(calibration.inputs)
        errors.append(float(relative_error(output, calibration.target).mean()))
        progress("calibrate", len(errors), len(plan.parts), relative_error=round(errors[-1], 4))
        after(attention)

    with torch.random.fork_rng(devices=[]), torch.no_grad(), observed(model, observe), mode(model, "observe"):
        model(ids.to(device), **few_logits(model))
    return errors
