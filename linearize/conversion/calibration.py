"""Starting the mixers: the teacher runs once over a few sequences, and each layer's mixer is started as its inputs pass by."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from linearize.conversion.plan import Plan
from linearize.conversion.streaming import started_on, started_rows
from linearize.methods.base import Method
from linearize.methods.calibration import Calibration, relative_error
from linearize.methods.slot_fit import ScoreFit, set_rates
from linearize.modeling.attention import LinearizedAttention
from linearize.modeling.mixer import Mixer
from linearize.modeling.modeling_linearized import mode, observed
from linearize.modeling.stream import Inputs
from linearize.progress import Progress

SEEDS = 2**62
Scores = Mapping[int, Mapping[str, Tensor]]  # by layer, what its slot score's parameters are


def few_logits(model: nn.Module) -> dict[str, int]:
    """The argument that spares a decoder the logits that nobody reads; an encoder has none."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def fit_scores(model: nn.Module, ids: Tensor, device: torch.device, progress: Progress) -> Scores:
    """By layer, the score by which slots are given away where it is learnt, fitted to what the teacher does on rows (B, T).

    A row at a time: only sums over the rows are held.
    """
    fits: dict[int, ScoreFit] = {}

    def observe(attention: LinearizedAttention, inputs: Inputs, target: Tensor) -> None:
        planned, layer = attention.linearize, attention.linearize_index
        if planned.spec.scores_learned:
            fits.setdefault(layer, ScoreFit(planned.spec, planned.shape)).add(Calibration(inputs, target))

    with torch.no_grad(), observed(model, observe), mode(model, "observe"):
        for i, row in enumerate(ids):
            model(row[None].to(device), **few_logits(model))
            progress("fit slot scores", i + 1, len(ids))
    return {layer: fit.solved().state_dict() for layer, fit in fits.items()}


def start_mixer(mixer: Mixer, method: Method, every: Calibration, score: Mapping[str, Tensor] | None = None) -> Calibration:
    """Give it its slot score, if that is learnt, which fades as the spec says, and start the memory on some of the rows, those of
    `started_on`: they come back."""
    if mixer.slot_score is not None and score is not None:
        mixer.slot_score.load_state_dict(score)
    set_rates(mixer)
    rows, tokens = started_on(mixer.spec, every.target.shape[1])
    some = every.part(slice(rows)).first(tokens)
    if mixer.spec.has_far:
        method.initialise(mixer, some)
    return some


def start_mixers(
    model: nn.Module, plan: Plan, ids: Tensor, seed: int, device: torch.device, progress: Progress,
    after: Callable[[LinearizedAttention], None] = lambda attention: None, scores: Scores | None = None,
) -> list[float]:  # fmt: skip
    """Run the teacher over ids (B, T); each layer's mixer is built and started as its inputs pass, then handed to `after`.

    Learnt slot scores are fitted first, unless they are given. What a start draws depends on the seed and the layer alone.
    Returns each layer's relative error.
    """
    seeds = torch.randint(SEEDS, (plan.total,), generator=torch.Generator().manual_seed(seed)).tolist()
    errors: list[float] = []
    if scores is None:
        learned = any(mixer.scores_learned for mixer in plan.mixers)
        scores = fit_scores(model, ids, device, progress) if learned else {}
    ids = ids[: started_rows(plan.mixers, ids.shape[1])]

    def observe(attention: LinearizedAttention, inputs: Inputs, target: Tensor) -> None:
        every, planned, layer = Calibration(inputs, target), attention.linearize, attention.linearize_index
        torch.manual_seed(seeds[layer])
        with torch.device(device):
            mixer = attention.linearize = Mixer(planned.spec, planned.shape)
        mixer.eval()
        calibration = start_mixer(mixer, plan.parts[layer].method, every, scores.get(layer))
        output, _ = mixer(calibration.inputs)
        errors.append(float(relative_error(output, calibration.target).mean()))
        progress("calibrate", len(errors), len(plan.parts), relative_error=round(errors[-1], 4))
        after(attention)

    with torch.random.fork_rng(devices=[]), torch.no_grad(), observed(model, observe), mode(model, "observe"):
        model(ids.to(device), **few_logits(model))
    return errors
