"""Losses of one mixer against the attention that it replaces, by name: a mean over rows, so that processes with equally many
rows average to the loss of one process with them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.distillation.weights_loss import cross_entropy
from linearize.methods.calibration import Calibration
from linearize.modeling.mixer import Mixer
from linearize.modeling.rows import Rows, make_rows
from linearize.modeling.spec import MixerSpec
from linearize.modeling.stream import Halves, Inputs


@dataclass
class LayerCall:
    """A mixer's inputs and target (B, T, H, V), the weight of each token (B, T) or None, and what several losses look at."""

    mixer: Mixer
    inputs: Inputs
    target: Tensor
    weight: Tensor | None = None

    @cached_property
    def entered(self) -> tuple[Halves, Callable[[Tensor], Tensor]]:
        """The mixer's halves, of rows of their own, and what brings such rows (rows, h, L, .) to their tokens (B, h, T, .)."""
        rows = self._rows
        return self.mixer.halves(self.inputs, rows), (lambda x: x if rows is None else rows.scatter(x))

    @cached_property
    def _rows(self) -> Rows | None:
        batch, _, time, _ = self.inputs.q.shape
        return make_rows(self.inputs.mask, self.inputs.segments, batch, time, self.inputs.q.device)

    @cached_property
    def output(self) -> Tensor:
        """What the mixer says, (B, T, H, V)."""
        halves, scatter = self.entered
        return scatter(self.mixer.combine(halves)).transpose(1, 2)

    @property
    def whole(self) -> Inputs:
        """Of rows of which these tokens are all, or those from number `first` on."""
        return self.inputs

    @property
    def first(self) -> int:
        return 0

    @cached_property
    def log_mass(self) -> Tensor:
        """log sum exp of the teacher's scores, (B, H, T)."""
        rows, inputs = self._rows, self.inputs
        if rows is None:
            return Calibration(inputs, self.target).log_mass()
        apart = replace(inputs, q=rows.gather(inputs.q), k=rows.gather(inputs.k))
        return rows.scatter(Calibration(apart, self.target).log_mass()[..., None])[..., 0]

    @cached_property
    def counted(self) -> Tensor:
        """The weight of each token, (B, T)."""
        return torch.ones_like(self.target[..., 0, 0], dtype=wide(self.target).dtype) if self.weight is None else self.weight

    def per_row(self, x: Tensor) -> Tensor:
        """What a sum over each row's tokens (B,) comes to where a loss divides by it."""
        return x

    def weighted(self, x: Tensor) -> Tensor:
        """x (B, T, H, V) times the weight of its token."""
        return x if self.weight is None else x * self.weight[..., None, None]


LayerLoss = Callable[[LayerCall], Tensor]


def wide(x: Tensor) -> Tensor:
    """At least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def relative_mse(call: LayerCall) -> Tensor:
    """sum w ||y - y'||^2 / sum w ||y||^2 of each row: deep layers, whose outputs are larger, do not drown the rest."""
    target = wide(call.target)
    error = call.weighted(F.mse_loss(wide(call.output), target, reduction="none")).sum((1, 2, 3))
    loss: Tensor = (error / call.per_row(call.weighted(target.square()).sum((1, 2, 3))).clamp(min=1e-12)).mean()
    return loss


def mse(call: LayerCall) -> Tensor:
    """1000 times the mean squared error of the heads' outputs (LoLCATs, section 3.2)."""
    error = call.weighted(F.mse_loss(wide(call.output), wide(call.target), reduction="none")).mean((2, 3)).sum(1)
    return 1000 * (error / call.per_row(call.counted.sum(1))).mean()


def weights(call: LayerCall) -> Tensor:
    """Cross-entropy of the teacher's attention weights (Hedgehog, section 4.2), for a mixer whose output is a mean of values.

    -sum_i A_ti log A'_ti, with A' = phi(q) phi(k) / sum phi(q) phi(k). A mixer with a near half,
    gates or padding has weights of another form, and so has a teacher that slides or has learned sinks: the relative output
    error is taken there.
    """
    mixer, inputs = call.mixer, call.whole
    plain = inputs.mask is None and inputs.score.sliding is None and inputs.score.null is None
    if mixer.spec.has_near or mixer.spec.decay != "none" or not plain:
        return relative_mse(call)
    phi_q, phi_k = mixer.features(inputs)
    q, k = inputs.q.to(phi_q.dtype), inputs.k.to(phi_k.dtype)
    own = slice(call.first, call.first + call.inputs.q.shape[2])
    mean = 1 / call.inputs.q[..., 0].numel()
    return cross_entropy(phi_q, phi_k, q, k, inputs.score, inputs.segments, mixer.spec.causal, own, mean)


def weighs_mass(spec: MixerSpec) -> bool:
    """Whether a mixer gives part of one softmax to its far memory, as `mass` needs."""
    return spec.has_near and spec.has_far and spec.merge == "denominator" and not spec.null_logits


def mass(call: LayerCall) -> Tensor:
    """KL(p || p') of the share of attention that lies on near and on far tokens, a mean over heads and tokens.

    p = 1 - near mass / whole mass is the teacher's, p' = sigma(log far mass - log near mass) the student's; both have the near
    half in common, since it is exact. A mixer must have such a share: see `weighs_mass`.
    """
    halves, scatter = call.entered
    assert halves.near is not None
    odds = call.mixer.far_odds(halves)
    there, near = odds > -torch.inf, halves.near.top + halves.near.denominator.log()
    odds, near, filled = (scatter(x[..., None])[..., 0] for x in (odds.where(there, 0.0), near, there.to(near.dtype)))
    with torch.no_grad():
        share = -torch.expm1((near - call.log_mass).clamp(max=0.0))
        entropy = torch.special.entr(share) + torch.special.entr(1 - share)
    gap = F.binary_cross_entropy_with_logits(odds, share.to(odds.dtype), reduction="none") - entropy
    counted = call.counted.to(gap.dtype)
    every = call.per_row(counted.sum(1)) * gap.shape[1]
    loss: Tensor = ((gap * filled * counted[:, None]).sum((1, 2)) / every.clamp(min=1e-12)).mean()
    return loss


LAYER_LOSSES: dict[str, LayerLoss] = {"relative_mse": relative_mse, "mse": mse, "weights": weights, "mass": mass}
