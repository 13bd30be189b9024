"""Closed-form and fitted starts for the parameters of a mixer, shared by the methods. Imported only when a model is converted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from linearize.methods.calibration import Calibration, relative_error
from linearize.modeling.feature_maps_basic import Hedgehog
from linearize.modeling.gates import HiddenGate
from linearize.modeling.mixer import Mixer

SCALES = (1.0, 2.0, 4.0)
SHIFTS = (0.0, -0.5, -1.0, -2.0, -3.0, -5.0, -8.0)
RIDGE = 1e-3
MIN_DISTANCE = 0.5


def constant_far_mass(mixer: Mixer, log_mass: float) -> None:
    """a_h = log_mass above the near half's largest score, for every head and query."""
    if mixer.far_mass is not None and mixer.far_mass.kind != "none":
        mixer.far_mass.bias.data.fill_(log_mass)


def fit_far_mass(mixer: Mixer, calibration: Calibration) -> Tensor | None:
    """The teacher's far mass by least squares, then the shift of each head that gives the least output error: (H,), or None.

    a_t = log sum_far e^s - log phi(q_t) z_t, weighted by p (1 - p) with p the teacher's far share: the derivative of p by its
    log odds. A memory that reads the wrong mean should weigh less than the teacher's, down to nothing at all.
    """
    mass = mixer.far_mass
    if mass is None or mass.kind == "none":
        return None
    near, read, far_q = mixer.halves(calibration.inputs)
    if near is None or read is None:
        return None
    far, every = calibration.far_log_mass(mixer.spec)
    share = (far - every).exp()
    usable = torch.isfinite(far) & (read[..., -1] > 0)
    weight = torch.where(usable, share * (1 - share) + 1e-4, 0.0)
    target = torch.where(usable, far - read[..., -1].clamp(min=1e-30).log(), 0.0)
    if mass.kind == "head":
        gap = weight * (target - near.top)
        mass.bias.data.copy_(gap.sum((0, 2)) / weight.sum((0, 2)).clamp(min=1e-6))
    else:
        ones = torch.ones_like(near.top)[..., None]
        columns = torch.cat([far_q, near.top[..., None], ones], dim=-1)  # (B, H, T, D + 2)
        solution = weighted_least_squares(columns, target, weight)
        dim = far_q.shape[-1]
        mass.query.data.copy_(solution[:, :dim])
        mass.near.data.copy_(solution[:, dim])
        mass.bias.data.copy_(solution[:, dim + 1])
    fitted, best = mass.bias.data.clone(), torch.full_like(mass.bias.data, math.inf)
    chosen = fitted.clone()
    for shift in SHIFTS:
        mass.bias.data.copy_(fitted + shift)
        errors = relative_error(mixer.merge(near, read, far_q).transpose(1, 2), calibration.target)
        chosen = torch.where(errors < best, mass.bias.data, chosen)
        best = torch.minimum(errors, best)
    mass.bias.data.copy_(chosen)
    return best


def weighted_least_squares(columns: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Ridge solution (H, C) of columns (B, H, T, C) against target (B, H, T); the last column is not penalised."""
    x = columns.transpose(0, 1).flatten(1, 2).double()
    y, w = (a.transpose(0, 1).flatten(1, 2).double() for a in (target, weight))
    gram = x.transpose(1, 2) @ (x * w[..., None])
    scale = gram.diagonal(dim1=1, dim2=2).mean(-1)
    penalty = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
    penalty[-1] = 0.0
    gram = (
        gram + torch.diag(penalty)[None] * (RIDGE * scale[:, None, None] + 1e-9) + 1e-12 * torch.eye(x.shape[-1], device=x.device)
    )
    solution: Tensor = torch.linalg.solve(gram, (x * (w * y)[..., None]).sum(1)[..., None])
    return solution[..., 0].float()


def scale_maps(mixer: Mixer, calibration: Calibration) -> None:
    """The identity maps times the scale, out of a few, that gives each memory the least relative output error."""
    maps = [m for m in (mixer.map_q, mixer.map_k) if isinstance(m, Hedgehog)]
    if not maps:
        return
    identity = [m.weight.data.clone() for m in maps]
    heads = calibration.inputs.q.shape[1]
    best = torch.full((heads,), math.inf, device=calibration.target.device)
    chosen = torch.ones_like(best)
    for scale in SCALES:
        for m, eye in zip(maps, identity, strict=True):
            m.weight.data.copy_(eye * scale)
        errors = fit_far_mass(mixer, calibration)
        if errors is None:
            errors = relative_error(mixer(calibration.inputs)[0], calibration.target)
        errors = errors.view(mixer.memories, -1).mean(1).repeat_interleave(mixer.readers)
        chosen = torch.where(errors < best, scale, chosen)
        best = torch.minimum(errors, best)
    for m, eye in zip(maps, identity, strict=True):
        m.weight.data.copy_(eye * chosen.view(m.heads, -1)[:, 0, None, None])


def fit_decay(mixer: Mixer, calibration: Calibration) -> None:
    """Constant gates whose half-life is the teacher's mean attention distance: log alpha = -ln 2 / distance."""
    gate = mixer.gate
    if not isinstance(gate, HiddenGate):
        return
    distance = calibration.mean_distance().clamp(min=MIN_DISTANCE).view(mixer.memories, -1).amax(1)
    log_alpha = -math.log(2) / distance * gate.divisor  # = log sigmoid(bias)
    bias = log_alpha - torch.log(-torch.expm1(log_alpha))
    gate.bias.data.copy_(bias.clamp(-12, 12).repeat_interleave(gate.width))
