"""Closed-form and fitted starts for the parameters of a mixer, shared by the methods. Imported only when a model is converted."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linearize.methods.calibration import Calibration, relative_error
from linearize.modeling.feature_maps_hedgehog import Hedgehog
from linearize.modeling.feature_maps_learned import T2R, Feedforward
from linearize.modeling.gates import FixedGate, HiddenGate, Projection
from linearize.modeling.mixer import Mixer
from linearize.modeling.stream import Halves
from linearize.modeling.window import Part

SCALES = (1.0, 2.0, 4.0)
SHIFTS = (0.0, -0.5, -1.0, -2.0, -3.0, -5.0, -8.0)
RIDGE = 1e-3
MIN_DISTANCE = 0.5
OUTPUT_RIDGES = (0.01, 0.1, 1.0, 10.0)
RIDGE_BLOCK = 64
SHARE_OPEN = 0.98


def calibrate(mixer: Mixer, calibration: Calibration) -> None:
    """Start a mixer as near to the teacher as its parameters allow: decays, gate, maps, output, merge, in that order."""
    fit_decay(mixer, calibration)
    open_gate(mixer, calibration)
    near = scale_maps(mixer, calibration)
    fit_output(mixer, calibration)
    fit_merge(mixer, calibration, near)


def constant_far_mass(mixer: Mixer, log_mass: float) -> None:
    """a_h = log_mass above the near half's largest score, for every head and query."""
    if mixer.far_mass is not None and mixer.far_mass.kind != "none":
        mixer.far_mass.bias.data.fill_(log_mass)


class Fitted(NamedTuple):
    """The output error a head (H,), None where there was nothing to fit; and the near half, which no fit of the memory changes."""

    errors: Tensor | None = None
    near: Part | None = None


def halves_beside(mixer: Mixer, calibration: Calibration, near: Part | None) -> Halves:
    """Both halves; where the near one is given, slots are not read again."""
    if near is None:
        return mixer.halves(calibration.inputs)
    mixer.ablate = "slots"
    try:
        return replace(mixer.halves(calibration.inputs), near=near)
    finally:
        mixer.ablate = None


def fit_merge(mixer: Mixer, calibration: Calibration, near_part: Part | None = None) -> Fitted:
    """The merge that gives the least output error, beside this near half where it is known."""
    if not mixer.spec.has_near:
        return Fitted()
    halves = halves_beside(mixer, calibration, near_part)
    if halves.near is None or halves.far is None:
        return Fitted()
    if mixer.far_mass is not None:
        return Fitted(fit_far_mass(mixer, halves, calibration), halves.near)
    near, far, target = halves.near.output(), halves.far, calibration.target.transpose(1, 2).to(halves.far.dtype)
    if mixer.merge.weights is not None:
        mixer.merge.weights.data.copy_(two_weights(near, far, target).float())
    elif mixer.merge.gate is not None:
        gap = near - far
        bias: Any = mixer.merge.gate.bias
        share = ((target - far) * gap).sum((0, 2, 3)) / gap.square().sum((0, 2, 3)).clamp(min=1e-12)
        bias.data.copy_(torch.logit(share.clamp(0.02, 0.98)))
    return Fitted(error_of(mixer, halves, calibration), halves.near)


def error_of(mixer: Mixer, halves: Halves, calibration: Calibration) -> Tensor:
    return relative_error(mixer.combine(halves).transpose(1, 2), calibration.target)


def two_weights(near: Tensor, far: Tensor, target: Tensor) -> Tensor:
    """a, b (2, H) with the least |a near + b far - target|^2 over a head's tokens, tensors (B, H, T, V)."""
    columns = torch.stack([near, far], dim=-1).transpose(0, 1).flatten(1, 3).double()
    gram = columns.transpose(1, 2) @ columns
    size = gram.diagonal(dim1=1, dim2=2).amax(-1)[:, None, None]
    gram = gram + 1e-6 * size * torch.eye(2, dtype=gram.dtype, device=gram.device)
    right = columns.transpose(1, 2) @ target.transpose(0, 1).flatten(1, 3).double()[..., None]
    solution: Tensor = torch.linalg.solve(gram, right)
    return solution[..., 0].T


def fit_far_mass(mixer: Mixer, halves: Halves, calibration: Calibration) -> Tensor:
    """The teacher's far mass by least squares, then the shift of each head that gives the least output error: (H,).

    a_t = log (sum_all e^s - near mass) - log mass_t, weighted by p (1 - p) with p the teacher's far share: the derivative of p by
    its log odds. A memory that reads the wrong mean should weigh less than the teacher's, down to nothing at all.
    """
    mass, near, far_q = mixer.far_mass, halves.near, halves.stream.far_q
    assert mass is not None
    assert near is not None
    assert halves.mass is not None
    every = calibration.log_mass()
    share = -torch.expm1((near.top + near.denominator.log() - every).clamp(max=0.0))
    usable = (share > 1e-6) & (halves.mass > 0)
    weight = torch.where(usable, share * (1 - share) + 1e-4, 0.0)
    own = halves.mass.clamp(min=1e-30).log()
    target = torch.where(usable, every + share.clamp(min=1e-6).log() - own, 0.0)
    if mass.kind == "head":
        gap = weight * (target - near.top)
        mass.bias.data.copy_(gap.sum((0, 2)) / weight.sum((0, 2)).clamp(min=1e-6))
    elif mass.kind == "query":
        columns = torch.cat([far_q, near.top[..., None], torch.ones_like(near.top)[..., None]], dim=-1)  # (B, H, T, D + 2)
        solution = weighted_least_squares(columns, target, weight)
        dim = far_q.shape[-1]
        mass.query.data.copy_(solution[:, :dim])
        mass.near.data.copy_(solution[:, dim])
        mass.bias.data.copy_(solution[:, dim + 1])
    else:
        return error_of(mixer, halves, calibration)
    fitted, best = mass.bias.data.clone(), torch.full_like(mass.bias.data, math.inf)
    chosen = fitted.clone()
    odds, error = mixer.far_odds(halves), Quadratic.of(halves, calibration)
    for shift in SHIFTS:
        mass.bias.data.copy_(fitted + shift)
        errors = error(torch.sigmoid(odds + shift))
        chosen = torch.where(errors < best, mass.bias.data, chosen)
        best = torch.minimum(errors, best)
    mass.bias.data.copy_(chosen)
    return best


@dataclass(frozen=True)
class Quadratic:
    """|n - y + p (f - n)|^2 / |y|^2 a head, of near and far outputs n and f and the teacher's y: of the far half's share p alone.

    |n - y|^2, 2 (n - y) . (f - n) and |f - n|^2 (B, H, T); |y|^2 (H,).
    """

    near: Tensor
    across: Tensor
    apart: Tensor
    whole: Tensor

    @classmethod
    def of(cls, halves: Halves, calibration: Calibration) -> Quadratic:
        assert halves.near is not None
        assert halves.far is not None
        near, target = halves.near.output(), calibration.target.transpose(1, 2).to(halves.far.dtype)
        off, gap, whole = near - target, halves.far - near, target.square().sum((0, 2, 3)).clamp(min=1e-12)
        return cls(off.square().sum(-1), 2 * (off * gap).sum(-1), gap.square().sum(-1), whole)

    def __call__(self, share: Tensor) -> Tensor:
        """Of shares (B, H, T): (H,)."""
        return (self.near + share * (self.across + share * self.apart)).sum((0, 2)) / self.whole


def weighted_least_squares(columns: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Ridge solution (H, C) of columns (B, H, T, C) against target (B, H, T); the last column is not penalised."""
    x = columns.transpose(0, 1).flatten(1, 2).double()
    y, w = (a.transpose(0, 1).flatten(1, 2).double() for a in (target, weight))
    gram = x.transpose(1, 2) @ (x * w[..., None])
    scale = gram.diagonal(dim1=1, dim2=2).mean(-1)
    penalty = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
    penalty[-1] = 0.0
    floor = 1e-12 * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    gram = gram + torch.diag(penalty)[None] * (RIDGE * scale[:, None, None] + 1e-9) + floor
    solution: Tensor = torch.linalg.solve(gram, (x * (w * y)[..., None]).sum(1)[..., None])
    return solution[..., 0].float()


def fit_output(mixer: Mixer, calibration: Calibration) -> None:
    """Map, norm weight or sigmoid gate of the output, whichever stands last: least squares on what near leaves over."""
    output = mixer.output
    gated = output.gate is not None and output.gate.bias is not None and output.activation == "sigmoid"
    if output.map is None and output.weight is None and not gated:
        return
    halves, target = mixer.halves(calibration.inputs), calibration.target.transpose(1, 2)
    if halves.near is not None and mixer.spec.merge == "sum":
        target = target - mixer.merge.constants[0] * halves.near.output()
    assert halves.far is not None
    far, goal = (x.transpose(0, 1).flatten(1, 2).double() for x in (halves.far, target))  # (H, N, V)
    if output.map is not None:
        output.map.data.copy_((output.map.data.double() @ held_out_ridge(far, goal)).float())
        return
    factor = (far * goal).sum(1) / far.square().sum(1).clamp(min=1e-12)
    if output.weight is not None:
        output.weight.data.mul_(factor.float())
    else:  # without a norm the gate alone can bring the memory to the teacher's size
        assert output.gate is not None
        assert output.gate.bias is not None
        bias = output.gate.bias.data.view(factor.shape)
        bias.copy_(torch.logit((factor * bias.sigmoid()).clamp(0.01, SHARE_OPEN)))


def open_gate(mixer: Mixer, calibration: Calibration) -> None:
    """A gate without bias at what its bias would be: W x = open by least squares over the layer's inputs x (B, T, C)."""
    gate, hidden = mixer.output.gate, calibration.inputs.hidden
    if gate is None or gate.bias is not None or hidden is None:
        return
    x = hidden if gate.down is None else hidden @ gate.down.to(hidden.dtype).T
    x = x.flatten(0, 1).double()[None]
    target = torch.full_like(x[..., :1], mixer.output.open)
    gate.up.data.copy_(ridge_map(x, target, RIDGE)[0, :, 0].expand_as(gate.up))


def held_out_ridge(x: Tensor, y: Tensor) -> Tensor:
    """W (H, V, V) of x W = y, x and y (H, N, V), with the ridge a head whose fit to one half of the blocks serves the other best.

    Where none does, W = 0: thousands of values fitted to a thousand tokens can do more harm than good.
    """
    block = torch.arange(x.shape[1], device=x.device) // RIDGE_BLOCK % 2 == 0
    best = y[:, ~block].square().sum((1, 2))
    chosen = torch.zeros(x.shape[0], x.shape[2], y.shape[2], dtype=x.dtype, device=x.device)
    for ridge in OUTPUT_RIDGES:
        error = (x[:, ~block] @ ridge_map(x[:, block], y[:, block], ridge) - y[:, ~block]).square().sum((1, 2))
        chosen = torch.where((error < best)[:, None, None], ridge_map(x, y, ridge), chosen)
        best = torch.minimum(error, best)
    return chosen


def ridge_map(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    gram = x.transpose(1, 2) @ x
    size = gram.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None].clamp(min=1e-12)
    gram = gram + ridge * size * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    solution: Tensor = torch.linalg.solve(gram, x.transpose(1, 2) @ y)
    return solution


def scale_maps(mixer: Mixer, calibration: Calibration) -> Part | None:
    """The identity maps times the scale, out of a few, that gives each memory the least relative output error; the near half comes
    back where it was made."""
    maps, near = [m for m in (mixer.map_q, mixer.map_k) if isinstance(m, Hedgehog)], None
    if not maps:
        return near
    identity = [m.weight.data.clone() for m in maps]
    heads = calibration.inputs.q.shape[1]
    best = torch.full((heads,), math.inf, device=calibration.target.device)
    chosen = torch.ones_like(best)
    for scale in SCALES:
        for m, eye in zip(maps, identity, strict=True):
            m.weight.data.copy_(eye * scale)
        errors, near = fit_merge(mixer, calibration, near)
        if errors is None:
            errors = relative_error(mixer(calibration.inputs)[0], calibration.target)
        errors = errors.view(mixer.memories, -1).mean(1).repeat_interleave(mixer.readers)
        chosen = torch.where(errors < best, scale, chosen)
        best = torch.minimum(errors, best)
    for m, eye in zip(maps, identity, strict=True):
        m.weight.data.copy_(eye * chosen.view(m.heads, -1)[:, 0, None, None])
    return near


def fit_decay(mixer: Mixer, calibration: Calibration) -> None:
    """Constant decays whose half-life is the teacher's mean attention distance: log alpha = -ln 2 / distance."""
    gate = mixer.gate
    if not isinstance(gate, HiddenGate | FixedGate):
        return
    distance = calibration.mean_distance().clamp(min=MIN_DISTANCE).view(mixer.memories, -1).amax(1)
    log_alpha = -math.log(2) / distance
    if isinstance(gate, FixedGate):
        gate.log_decay.copy_(log_alpha)
        return
    bias = {"sigmoid": _logit_of_log(log_alpha * gate.divisor), "softplus": inverse_softplus(-log_alpha)}.get(gate.form)
    if bias is None:  # rwkv: log alpha = -e^-1/2 sigmoid(bias)
        bias = torch.logit((-log_alpha * math.exp(0.5)).clamp(1e-5, 0.999))
    if gate.a_log is not None:
        gate.a_log.data.zero_()
    assert gate.bias is not None
    own = gate.bias.data.view(gate.heads, 2 if gate.complex else 1, -1)
    bias = bias[:, None].expand_as(own[:, 0])
    if mixer.spec.rule == "slots":  # half-lives from 1/16 to 16 times that: slots that start equal stay equal in training
        factor = torch.exp2(torch.linspace(4, -4, bias.shape[1], device=bias.device))
        bias = _logit_of_log(torch.nn.functional.logsigmoid(bias) * factor)
    own[:, 0] = bias.clamp(-12, 12)


def inverse_softplus(x: Tensor) -> Tensor:
    return x + torch.log(-torch.expm1(-x))


def _logit_of_log(log_sigmoid: Tensor) -> Tensor:
    """The logit whose log-sigmoid is given."""
    return log_sigmoid - torch.log(-torch.expm1(log_sigmoid))


# ---- starts of single papers ----


def slopes(mixer: Mixer) -> None:
    """Constant decays e^(-2^(-8 (h + 1) / H)): ALiBi's slopes (Press et al. 2022, section 3), as TransNormer takes them."""
    if isinstance(mixer.gate, FixedGate):
        heads = mixer.gate.log_decay.shape[0]
        head = torch.arange(1, heads + 1, device=mixer.gate.log_decay.device, dtype=torch.float32)
        mixer.gate.log_decay.copy_(-torch.exp2(-8 * head / heads))


def state_space(mixer: Mixer) -> None:
    """Mamba-2's decays, spread evenly instead of drawn: A from 1 to 16 over heads, steps from 0.001 to 0.1 over what has one."""
    gate = mixer.gate
    if not isinstance(gate, HiddenGate) or gate.a_log is None:
        return
    gate.a_log.data.copy_(torch.linspace(1, 16, gate.heads).log())
    assert gate.bias is not None
    bias = gate.bias.data.view(gate.heads, -1)
    step = torch.logspace(-3, -1, bias.shape[1] if bias.shape[1] > 1 else gate.heads, device=bias.device)
    bias.copy_(inverse_softplus(step) if bias.shape[1] > 1 else inverse_softplus(step)[:, None])


def random_maps(mixer: Mixer) -> None:
    """W and b of T2R as torch makes a linear layer: uniform within 1 / sqrt(dim)."""
    for m in (mixer.map_q, mixer.map_k):
        if isinstance(m, T2R):
            m.weight.data.uniform_(-(m.dim**-0.5), m.dim**-0.5)
            m.bias.data.uniform_(-(m.dim**-0.5), m.dim**-0.5)


def orthogonal_maps(mixer: Mixer) -> None:
    """Both layers of the feed-forward kernel at random orthogonal matrices, a head (Yorsh & Kovalenko 2022)."""
    for m in (mixer.map_q, mixer.map_k):
        if isinstance(m, Feedforward):
            for weight in (*m.hidden.data, *m.weight.data):
                torch.nn.init.orthogonal_(weight)


def random_projections(mixer: Mixer) -> None:
    """Convolutions and both gates, uniform within 1 / sqrt(inputs) as torch makes them; only Mamba has biases."""
    for conv in (mixer.conv_q, mixer.conv_k, mixer.conv_v):
        if conv is not None:
            conv.weight.data.uniform_(-(conv.weight.shape[0] ** -0.5), conv.weight.shape[0] ** -0.5)
    for projection in (mixer.gate, mixer.output.gate):
        if isinstance(projection, Projection):
            projection.up.data.uniform_(-(projection.up.shape[1] ** -0.5), projection.up.shape[1] ** -0.5)
            if projection.bias is not None and not (isinstance(projection, HiddenGate) and projection.a_log is not None):
                projection.bias.data.zero_()
