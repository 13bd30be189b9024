"""Starting the mixers: the teacher runs once over a few sequences, and each layer's mixer is started as its inputs pass by."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from linearize.conversion.plan import Plan
from linearize.conversion.streaming import CALIBRATION_LENGTH, CALIBRATION_ROWS, SCORE_LENGTH
from linearize.methods.base import Method
from linearize.methods.calibration import Calibration, relative_error
from linearize.methods.slot_fit import fit_slot_score, set_rates
from linearize.modeling.attention import LinearizedAttention
from linearize.modeling.mixer import Inputs, Mixer
from linearize.modeling.modeling_linearized import mode, observed
from linearize.progress import Progress

SEEDS = 2**62


def few_logits(model: nn.Module) -> dict[str, int]:
    """The argument that spares a decoder the logits that nobody reads; an encoder has none."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def start_mixer(mixer: Mixer, method: Method, every: Calibration, score: Mapping[str, Tensor] | None = None) -> Calibration:
    """Fit the score by which slots are given away on all rows, unless there is one (which fades as the spec says), and start the
    memory on some: these come back.

    They are the beginnings of the first rows or, behind slots whose score is learnt, 4,096 tokens of whole rows: of the first
    thousand few would get into the memory.
    """
    if mixer.slot_score is not None and score:
        mixer.slot_score.load_state_dict(score)
    else:
        fit_slot_score(mixer, every)
    set_rates(mixer)
    if mixer.spec.scores_learned:
        some = every.part(slice(max(SCORE_LENGTH // every.target.shape[1], 1)))
    else:
        some = every.part(slice(CALIBRATION_ROWS)).first(CALIBRATION_LENGTH)
    if mixer.spec.has_far:
        method.initialise(mixer, some)
    return some


def start_mixers(
    model: nn.Module, plan: Plan, ids: Tensor, seed: int, device: torch.device, progress: Progress,
    after: Callable[[LinearizedAttention], None] = lambda attention: None,
) -> list[float]:  # fmt: skip
    """Run the teacher over ids (B, T); each layer's mixer is built and started as its inputs pass, then handed to `after`.

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
        calibration = start_mixer(mixer, plan.parts[attention.linearize_index].method, every)
        output, _ = mixer(calibration.inputs)
        errors.append(float(relative_error(output, calibration.target).mean()))
        progress("calibrate", len(errors), len(plan.parts), relative_error=round(errors[-1], 4))
        after(attention)

    with torch.random.fork_rng(devices=[]), torch.no_grad(), observed(model, observe), mode(model, "observe"):
        model(ids.to(device), **few_logits(model))
    return errors
