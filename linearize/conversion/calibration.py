"""Starting the mixers: the teacher runs once over a few sequences, and each layer's mixer is started as its inputs pass by."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from linearize.conversion.plan import Plan
from linearize.methods.calibration import Calibration, relative_error
from linearize.modeling.attention import LinearizedAttention
from linearize.modeling.mixer import Inputs, Mixer
from linearize.modeling.modeling_linearized import mode, observed
from linearize.progress import Progress

SEEDS = 2**62


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
        calibration, planned = Calibration(inputs, target), attention.linearize
        torch.manual_seed(seeds[attention.linearize_index])
        with torch.device(device):
            mixer = attention.linearize = Mixer(planned.spec, planned.shape)
        mixer.eval()
        if mixer.spec.has_far:
            plan.parts[attention.linearize_index].method.initialise(mixer, calibration)
        output, _ = mixer(inputs)
        errors.append(float(relative_error(output, target).mean()))
        progress("calibrate", len(errors), len(plan.parts), relative_error=round(errors[-1], 4))
        after(attention)

    with torch.random.fork_rng(devices=[]), torch.no_grad(), observed(model, observe), mode(model, "observe"):
        model(ids.to(device), logits_to_keep=1)
    return errors
