"""Losses by name. Layer losses compare one mixer with the attention it replaces; logit losses compare whole models.

Layer losses take the mixer, its inputs and the target (B, T, H, V) and are a mean over rows, so that processes with equally
many rows average to the loss of one process with them all. Logit losses return a sum over counted tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.modeling.mixer import Inputs, Mixer

ROW_BLOCK = 256
LayerLoss = Callable[[Mixer, Inputs, Tensor], Tensor]


def wide(x: Tensor) -> Tensor:
    """At least fp32: what is summed up in a loss."""
    return x if x.dtype == torch.float64 else x.float()


def relative_mse(mixer: Mixer, inputs: Inputs, target: Tensor) -> Tensor:
    """sum ||y - y'||^2 / sum ||y||^2 of each row: deep layers, whose outputs are larger, do not drown the rest."""
    output, _ = mixer(inputs)
    target = wide(target)
    error = (wide(output) - target).square().sum((1, 2, 3))
    loss: Tensor = (error / target.square().sum((1, 2, 3)).clamp(min=1e-12)).mean()
    return loss


def mse(mixer: Mixer, inputs: Inputs, target: Tensor) -> Tensor:
    """1000 times the mean squared error of the heads' outputs (LoLCATs, section 3.2)."""
    output, _ = mixer(inputs)
    return 1000 * F.mse_loss(wide(output), wide(target))


def weights(mixer: Mixer, inputs: Inputs, target: Tensor) -> Tensor:
    """Cross-entropy of the teacher's attention weights (Hedgehog, section 4.2), for a mixer whose output is a mean of values.

    -sum_i A_ti log A'_ti in blocks of queries, with A' = phi(q) phi(k) / sum phi(q) phi(k). A mixer with a near half,
    gates or padding has weights of another form, and so has a teacher that slides or has learned sinks: the relative output
    error is taken there.
    """
    plain = inputs.mask is None and inputs.score.sliding is None and inputs.score.null is None
    if mixer.spec.has_near or mixer.spec.decay != "none" or not plain:
        return relative_mse(mixer, inputs, target)
    phi_q, phi_k = mixer.features(inputs)  # (B, M, R, T, K), (B, M, T, K)
    time, repeats = phi_k.shape[2], phi_q.shape[1] * phi_q.shape[2] // inputs.k.shape[1]
    q, k = wide(inputs.q), wide(inputs.k).repeat_interleave(repeats, dim=1)
    keys = torch.arange(time, device=q.device)
    total = q.new_zeros(())
    for start in range(0, time, ROW_BLOCK):
        block = slice(start, min(start + ROW_BLOCK, time))
        seen = block.stop if mixer.spec.causal else time
        later = (keys[:seen] > keys[block, None]) & mixer.spec.causal
        if inputs.segments is not None:  # packed documents do not see each other
            other = inputs.segments[:, None, block, None] != inputs.segments[:, None, None, :seen]
            later = later | other
        teacher = inputs.score(q[:, :, block], k[:, :, :seen]).masked_fill(later, -torch.inf).softmax(-1)
        student = phi_q[..., block, :] @ phi_k[:, :, None, :seen].transpose(-1, -2)
        student = student.flatten(1, 2).masked_fill(later, 0)
        log_ratio = student.clamp(min=1e-12).log() - student.sum(-1, keepdim=True).clamp(min=1e-12).log()
        total = total - (teacher * log_ratio.masked_fill(later, 0)).sum()
    return total / (q.shape[0] * q.shape[1] * time)


LAYER_LOSSES: dict[str, LayerLoss] = {"relative_mse": relative_mse, "mse": mse, "weights": weights}


def kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """sum_t KL(teacher || student) over tokens (N, vocabulary), times temperature squared (Hinton et al. 2015)."""
    total = wide(student.new_zeros(()))
    for start in range(0, len(student), ROW_BLOCK):
        own = (wide(student[start : start + ROW_BLOCK]) / temperature).log_softmax(-1)
        other = (wide(teacher[start : start + ROW_BLOCK]) / temperature).log_softmax(-1)
        total = total + F.kl_div(own, other, log_target=True, reduction="sum")
    return total * temperature**2


def ce(student: Tensor, targets: Tensor) -> Tensor:
    """sum_t -log p(target) over tokens (N, vocabulary)."""
    return F.cross_entropy(wide(student), targets, reduction="sum")
