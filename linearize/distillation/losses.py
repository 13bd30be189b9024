"""A stage's loss: names of the registries with factors, as in `kl + 0.1*ce`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from linearize.distillation.layer_losses import LAYER_LOSSES, weighs_mass
from linearize.distillation.logit_losses import LOGIT_LOSSES
from linearize.errors import UsageError
from linearize.methods.base import ATTENTION, Stage
from linearize.modeling.spec import MixerSpec


def terms(stage: Stage) -> dict[str, float]:
    """Names and factors of a stage's loss. UsageError for what cannot be read, and names that its kind does not know."""
    known: Mapping[str, object] = LAYER_LOSSES if stage.kind == ATTENTION else LOGIT_LOSSES
    where, found = f"stages.{stage.kind}.loss", dict[str, float]()
    for term in stage.loss.split("+"):
        *factor, name = (part.strip() for part in term.split("*"))
        if name not in known:
            close = get_close_matches(name, known, n=1)
            fix = f"did you mean '{close[0]}'?" if close else f"one of: {', '.join(known)}"
            raise UsageError(f"unknown loss '{name}'", where, fix)
        try:
            value = float(factor[0]) if factor else 1.0
        except ValueError:
            value = -1.0
        if len(factor) > 1 or not 0 < value < float("inf") or name in found:
            raise UsageError(f"cannot read the loss '{stage.loss}'", where, "write it as in: relative_mse + 0.1*mass")
        found[name] = value
    return found


def check_losses(stages: Iterable[Stage], layers: Iterable[Mapping[str, Any]]) -> None:
    """UsageError for a loss that cannot be read, or that a mixer of these layers does not have."""
    mixers = [(layer["module"], MixerSpec.from_dict(layer["mixer"])) for layer in layers]
    for stage in stages:
        if "mass" in terms(stage):
            for module, spec in mixers:
                if not weighs_mass(spec):
                    what = "the loss 'mass' needs a window and a memory that share one denominator"
                    raise UsageError(what, module, "another loss, or convert with --set merge=denominator")
