"""The oracle's far memories: one token at a time, each update rule as its paper writes it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from linearize.testing.oracle import Document


def gates(doc: Document) -> dict[str, Tensor]:
    """log-decays (M, T, .), delta rates and routes of all tokens, where they stand."""
    spec, mixer = doc.spec, doc.mixer
    memories, found = mixer.memories, {}
    gate: Any = mixer.gate
    source = torch.arange(memories) // (memories // doc.kv_heads)
    if spec.decay == "key":
        found["gate"] = torch.sigmoid(doc.plain_k)[source].log() / spec.gate_divisor
    elif spec.decay == "fixed":
        found["gate"] = gate.log_decay.to(doc.k)[:, None, None].expand(-1, doc.time, 1)
    elif spec.decay != "none":
        y = doc.projected(gate)
        angle = None
        if spec.decay == "complex":
            y, angle = y.chunk(2, -1)
        if spec.gate_form == "sigmoid":
            y = torch.sigmoid(y).log() / spec.gate_divisor
        elif spec.gate_form == "softplus":
            step = torch.log1p(y.exp())
            found["step"] = step
            y = -gate.a_log.exp()[:, None, None] * step
        else:
            y = -math.exp(-0.5) * torch.sigmoid(y)
        found["gate"] = y
        if angle is not None:
            found["angle"] = angle
    if spec.rule == "delta":
        found["beta"] = torch.sigmoid(doc.projected(mixer.beta)) * (2 if spec.negative else 1)
    if spec.experts:
        share = doc.projected(mixer.router).softmax(-1)
        least = share.sort(-1, descending=True).values[..., spec.active - 1 : spec.active]
        kept = share * (share >= least)
        found["route"] = kept / kept.sum(-1, keepdim=True)
    return found


class Memory:
    """Memory m of one document: for each expert and the shared one, a state (rows, V) and a mass (rows)."""

    def __init__(self, doc: Document, m: int, made: dict[str, Tensor]) -> None:
        self.doc, self.spec, self.mixer, self.index = doc, doc.spec, doc.mixer, m
        self.source = m * doc.kv_heads // doc.mixer.memories
        self.made = {name: x[m] for name, x in made.items()}
        sources, at = torch.arange(doc.mixer.memories) * doc.kv_heads // doc.mixer.memories, torch.arange(doc.time)[None]
        self.phi, self.before = (doc.mixer.map_k(keys[sources][None], at)[0, m] for keys in (doc.entry_k, doc.far_k))
        rows, columns = self.spec.rows(doc.mixer.shape), doc.v.shape[-1]
        if self.spec.decay == "complex":
            rows //= 2
        kind = torch.complex128 if self.spec.decay == "complex" else doc.k.dtype
        copies = self.spec.experts + 1
        self.state = [torch.zeros(rows, columns, dtype=kind) for _ in range(copies)]
        self.mass = [torch.zeros(rows, dtype=kind) for _ in range(copies)]
        self.keys = [torch.zeros(rows, self.phi.shape[-1], dtype=kind) for _ in range(copies)]  # of rule 'slots'

    def key(self, j: int, entered: bool = True) -> Tensor:
        own: Tensor = (self.phi if entered else self.before)[j]
        if self.spec.gate_key in ("complement", "balance"):
            forgotten = 1 - self.made["gate"][j].exp()
            return forgotten if self.spec.gate_key == "complement" else own * forgotten
        return own * self.made["step"][j] if self.spec.gate_key == "step" else own

    def own_key(self, j: int) -> Tensor:
        """The key under which token j would ask for its own value, as it is before it enters."""
        return self.unit_key(j, entered=False) if self.spec.rule == "delta" else self.key(j, entered=False)

    def unit_key(self, j: int, entered: bool = True) -> Tensor:
        """Of length one, by the feature map or by the delta rule."""
        return self.key(j, entered) if self.spec.feature_map == "unit" else unit(self.key(j, entered))

    def enter(self, j: int) -> None:
        route = self.made.get("route")
        for e in range(self.spec.experts + 1):
            if e == self.spec.experts or (route is not None and route[j, e] > 0):
                self._update(e, j)

    def _update(self, e: int, j: int) -> None:
        v, key = self.doc.entry_v[self.source, j], self.key(j)
        alpha = self.made["gate"][j].exp() if "gate" in self.made else torch.ones(1, dtype=v.dtype)
        if "angle" in self.made:
            alpha = torch.polar(alpha.double(), self.made["angle"][j].double())
        if self.spec.rule == "slots":
            self.keys[e] = alpha[:, None] * self.keys[e] + (1 - alpha)[:, None] * key
            self.state[e] = alpha[:, None] * self.state[e] + (1 - alpha)[:, None] * v
        elif self.spec.rule == "additive":
            self.state[e] = alpha[:, None] * self.state[e] + key[:, None] * v
            self.mass[e] = alpha * self.mass[e] + key
        elif self.spec.rank_one:
            kappa, key_rate = self.mixer.removal[self.index], self.mixer.key_rate[self.index]
            direction, rate = unit(key * kappa), self.made["beta"][j]
            removed = torch.outer(rate * direction, direction @ self.state[e])
            new = torch.outer(key * (1 + (rate - 1) * key_rate), v)
            self.state[e] = alpha[:, None] * self.state[e] - removed + new
        else:
            self.state[e] = alpha[:, None] * self.state[e]
            for i in range(self.spec.deltas):
                k, value = self.unit_key(j), v
                if i:
                    k, value = unit(key @ self.mixer.delta_k[i - 1, self.index]), v @ self.mixer.delta_v[i - 1, self.index]
                self.state[e] = self.state[e] + self.made["beta"][j, i] * torch.outer(k, value - k @ self.state[e])

    def read(self, q: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Output (V,) and mass of features q (K,), mixed over the memories that token t is routed to."""
        route = self.made.get("route")
        out, mass = q.new_zeros(self.doc.v.shape[-1]), q.new_zeros(())
        for e in range(self.spec.experts + 1):
            weight = 1.0 if route is None or e == self.spec.experts else route[t, e]
            if self.spec.rule == "slots":
                out = out + weight * ((self.keys[e] @ q).softmax(-1) @ self.state[e])
            else:
                out = out + weight * (q.to(self.state[e]) @ self.state[e]).real
                mass = mass + weight * (q.to(self.mass[e]) @ self.mass[e]).real
        return out, mass

    def rows(self) -> list[Tensor]:
        """Each state as the cache keeps it: (rows, columns)."""
        found = []
        for state, mass, keys in zip(self.state, self.mass, self.keys, strict=True):
            if self.spec.rule == "slots":
                found.append(torch.cat([keys, state], -1))
                continue
            whole = torch.cat([state, mass[:, None]], -1) if self.spec.normalise else state
            found.append(torch.cat([whole.real, -whole.imag]) if whole.is_complex() else whole)
        return found


def unit(x: Tensor) -> Tensor:
    return x / (x.pow(2).sum(-1, keepdim=True) + 1e-12).sqrt()
