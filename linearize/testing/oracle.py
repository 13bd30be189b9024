"""A whole mixer straight from its equations: near by masks, far by a loop over tokens. Parameters and feature maps are shared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from linearize.modeling.mixer import Inputs, Mixer


def oracle(mixer: Mixer, inputs: Inputs) -> Tensor:
    """The mixer's output (B, T, H, V), row by row and document by document, pads left out and zero."""
    batch, heads, time, _ = inputs.q.shape
    out = inputs.q.new_zeros(batch, time, heads, mixer.shape.value_dim)
    real = torch.ones(batch, time, dtype=torch.bool) if inputs.mask is None else inputs.mask.bool()
    document = torch.zeros(batch, time) if inputs.segments is None else inputs.segments.expand(batch, time)
    for row in range(batch):
        for number in set(document[row].tolist()):
            at = (real[row] & (document[row] == number)).nonzero()[:, 0]
            if len(at):
                out[row, at] = Document(mixer, inputs, row, at).output()
    return out


class Document:
    """One row's real tokens: q (H, T, D), k (G, T, D), v (G, T, V), hidden (T, C)."""

    def __init__(self, mixer: Mixer, inputs: Inputs, row: int, at: Tensor) -> None:
        self.mixer, self.spec, self.score = mixer, mixer.spec, inputs.score
        self.q, self.k, self.v = inputs.q[row][:, at], inputs.k[row][:, at], inputs.v[row][:, at]
        self.hidden = None if inputs.hidden is None else inputs.hidden[row, at]
        self.cos = None if inputs.cos is None else inputs.cos.expand(len(inputs.q), -1, -1)[row, at]
        self.sin = None if inputs.sin is None else inputs.sin.expand(len(inputs.q), -1, -1)[row, at]
        self.time = len(at)

    def output(self) -> Tensor:
        """(T, H, V)."""
        spec = self.spec
        if spec.merge == "near":
            numerator, denominator, _ = self.near()
            return (numerator / denominator[..., None]).transpose(0, 1)
        far, mass = self.far()
        alone = far / torch.where(mass == 0, 1.0, mass)[..., None] if spec.normalise else far
        if spec.merge == "far":
            return alone.transpose(0, 1)
        numerator, denominator, top = self.near()
        if spec.merge == "sum":
            mixed = spec.near_weight * numerator / denominator[..., None] + (1 - spec.near_weight) * alone
            return mixed.transpose(0, 1)
        weight = (self.far_log_mass(top) - top).exp()
        return ((numerator + weight[..., None] * far) / (denominator + weight * mass)[..., None]).transpose(0, 1)

    def near(self) -> tuple[Tensor, Tensor, Tensor]:
        """sum_j e^(s_j - top) v_j, sum_j e^(s_j - top), top = max_j s_j over sinks and window; top carries no gradient."""
        seen = self.seen()
        repeats = self.q.shape[0] // self.k.shape[0]
        scores = torch.einsum("htd,hjd->htj", self.q, self.k.repeat_interleave(repeats, 0)) * self.score.scale
        if self.score.softcap is not None:
            scores = self.score.softcap * torch.tanh(scores / self.score.softcap)
        top = scores.detach().masked_fill(~seen, -torch.inf).max(-1).values
        weights = (scores - top[..., None]).exp() * seen
        return weights @ self.v.repeat_interleave(repeats, 0), weights.sum(-1), top

    def seen(self) -> Tensor:
        """Which tokens (T queries, T keys) the near half shows."""
        t, j, width = torch.arange(self.time)[:, None], torch.arange(self.time), self.spec.window
        first = t - width + 1 if self.spec.window_kind == "sliding" else (t // width - 1) * width
        return (j <= t) & ((j < self.spec.sinks) | (j >= first))

    def far(self) -> tuple[Tensor, Tensor]:
        """phi(q_t)^T S_t (H, T, V) and phi(q_t)^T z_t (H, T), tokens entering one by one at their time."""
        memories, queries = self.mixer.memories, self.query_features()
        (phi, gate), v = self.entering(), self.v[self.source()]
        state, mass = phi.new_zeros(memories, phi.shape[-1], v.shape[-1]), phi.new_zeros(memories, phi.shape[-1])
        reads, masses = [], []
        for t in range(self.time):
            for j in (j for j in range(self.time) if self.entry(j) == t):
                decay = gate[:, j].exp()  # (M, K or 1)
                state = decay[..., None] * state + phi[:, j, :, None] * v[:, j, None, :]
                mass = decay * mass + phi[:, j]
            reads.append(torch.stack([q[t] @ state[h * memories // len(queries)] for h, q in enumerate(queries)]))
            masses.append(torch.stack([q[t] @ mass[h * memories // len(queries)] for h, q in enumerate(queries)]))
        return torch.stack(reads, 1), torch.stack(masses, 1)

    def source(self) -> Tensor:
        """The kv head whose keys memory m holds."""
        return torch.arange(self.mixer.memories) // (self.mixer.memories // self.k.shape[0])

    def entering(self) -> tuple[Tensor, Tensor]:
        """phi(k) (M, T, K) and log-decays (M, T, K or 1), computed where each token stands."""
        keys = self.convolved(self.unrotated(self.k), self.mixer.conv_k)
        return self.mixer.map_k(keys[self.source()][None])[0], self.gate(self.source())

    def entry(self, j: int) -> int:
        """The query at which token j is first in the far memory."""
        if self.spec.coverage == "all":
            return j
        if j < self.spec.sinks:
            return -1
        return j + self.spec.window if self.spec.window_kind == "sliding" else (j // self.spec.window + 2) * self.spec.window

    def far_query(self) -> Tensor:
        return self.convolved(self.unrotated(self.q), self.mixer.conv_q)

    def query_features(self) -> Tensor:
        """phi(q) (H, T, K): a head's own map, or its memory's where maps are tied."""
        q, memories = self.far_query(), self.mixer.memories
        if self.mixer.map_q is not None:
            return self.mixer.map_q(q[None])[0]  # type: ignore[no-any-return]
        readers = len(q) // memories
        phi = [self.mixer.map_k(q[r::readers][None])[0] for r in range(readers)]  # the r-th reader of every memory
        return torch.stack(phi, 1).flatten(0, 1)

    def unrotated(self, x: Tensor, always: bool = False) -> Tensor:
        """x e^(-i angle) on pairs (x_c, x_(c + D/2)) of the rotary channels."""
        if self.cos is None or self.sin is None or (self.spec.far_rope and not always):
            return x
        half = self.cos.shape[-1] // 2
        turn = torch.complex(self.cos[:, :half], self.sin[:, :half])
        plain = torch.complex(x[..., :half], x[..., half : 2 * half]) / turn
        return torch.cat([plain.real, plain.imag, x[..., 2 * half :]], -1)

    def convolved(self, x: Tensor, conv: nn.Module | None) -> Tensor:
        if conv is None:
            return x
        taps: Tensor = conv.weight  # type: ignore[assignment]  # (n, h, D), the last for the token itself
        steps = [sum(taps[-1 - i] * x[:, t - i] for i in range(min(len(taps), t + 1))) for t in range(self.time)]
        return torch.stack(steps, 1)  # type: ignore[arg-type]

    def gate(self, source: Tensor) -> Tensor:
        spec = self.spec
        gate: Any = self.mixer.gate
        if spec.decay == "none":
            return self.k.new_zeros(len(source), self.time, 1)
        if spec.decay == "key":
            return torch.sigmoid(self.unrotated(self.k, always=True))[source].log() / spec.gate_divisor
        weight = gate.up if gate.down is None else gate.up @ gate.down
        logits = torch.einsum("tc,oc->to", self.hidden, weight) + gate.bias
        return (torch.sigmoid(logits).log() / spec.gate_divisor).view(self.time, len(source), -1).transpose(0, 1)

    def far_log_mass(self, top: Tensor) -> Tensor:
        """a_t = u_h . q_t + b_h + c_h top_t (H, T), or the part of it that the spec has."""
        mass = self.mixer.far_mass
        if self.spec.far_mass == "none" or mass is None:
            return top
        if self.spec.far_mass == "head":
            return top + mass.bias[:, None]
        return torch.einsum("htd,hd->ht", self.far_query(), mass.query) + mass.bias[:, None] + mass.near[:, None] * top
