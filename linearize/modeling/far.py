"""The far memory: what enters it, how it is updated, how it is read. One of four engines by rule and decay."""

from __future__ import annotations

from typing import Any

try:
    import torch
    from torch import Tensor, nn
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .backends import additive_chunked, additive_step, tied_chunked, tied_step
from .convolution import CausalConv
from .feature_maps import FEATURE_MAPS
from .gates import GATES, Beta, FixedGate, HiddenGate, Router
from .recurrence_additive import whole as additive_whole
from .recurrence_complex import chunked as complex_chunked
from .recurrence_complex import step as complex_step
from .recurrence_delta import chunked as delta_chunked
from .recurrence_delta import step as delta_step
from .recurrence_slots import chunked as slots_chunked
from .recurrence_slots import step as slots_step
from .spec import MixerSpec, Shape
from .spec_maps import MAPS

Entries = tuple[Tensor | None, ...]  # what the engine takes of the tokens that enter, in its own order
ENGINES: dict[str, tuple[Any, Any]] = {
    "additive": (additive_chunked, additive_step),
    "whole": (additive_whole, additive_step),  # an encoder's: a step is never taken
    "complex": (complex_chunked, complex_step),
    "delta": (delta_chunked, delta_step),
    "slots": (slots_chunked, slots_step),
    "tied": (tied_chunked, tied_step),  # the delta engine, with what a kernel takes beside its own arguments
}


class Far(nn.Module):
    """Parameters and equations of one layer's far memory. M memories, read by R = H / M heads each."""

    def __init__(self, spec: MixerSpec, shape: Shape) -> None:
        super().__init__()
        self.spec, self.shape = spec, shape
        self.memories = spec.memories(shape)
        self.readers = shape.heads // self.memories
        self.repeats = self.memories // shape.kv_heads
        self.map_q: Any = None
        if not spec.has_far:
            return
        feature_map, dim = FEATURE_MAPS[spec.feature_map], shape.head_dim
        self.map_k = feature_map(self.memories, dim, spec, "k")
        if not spec.tied_maps:
            self.map_q = feature_map(shape.heads, dim, spec, "q")
        self.gate = None if spec.decay == "none" else GATES[spec.decay](spec, shape)
        self.beta = Beta(spec, shape) if spec.rule == "delta" else None
        self.router = Router(spec, shape) if spec.experts else None
        self.conv_q = CausalConv(shape.heads, dim, spec.conv) if spec.conv else None
        self.conv_k = CausalConv(shape.kv_heads, dim, spec.conv) if spec.conv else None
        self.conv_v = CausalConv(shape.kv_heads, shape.value_dim, spec.conv) if spec.conv_v else None
        tied = spec.rule == "delta" and not spec.rank_one
        kind = "complex" if spec.decay == "complex" else "tied" if tied else spec.rule
        self.engine = ENGINES[kind if spec.causal else "whole"]
        self._deltas()

    def _deltas(self) -> None:
        """Keys and values of further deltas, and the removal direction of rank one, as the token's own at first."""
        spec, shape, more = self.spec, self.shape, self.spec.deltas - 1
        features = spec.features(shape)
        if more:
            self.delta_k = nn.Parameter(torch.eye(features).repeat(more, self.memories, 1, 1))
            self.delta_v = nn.Parameter(torch.eye(shape.value_dim).repeat(more, self.memories, 1, 1))
        if spec.rank_one:
            self.removal = nn.Parameter(torch.full((self.memories, features), 0.85))
            self.key_rate = nn.Parameter(torch.ones(self.memories, features))

    # ---- on arrival ----

    def arrivals(self, hidden: Tensor | None, key: Tensor) -> dict[str, Tensor]:
        """Log-decays, delta rates and routes of new tokens; `key` (B, G, T, D) before RoPE where the gate reads it."""
        found = {}
        if self.gate is not None and not isinstance(self.gate, FixedGate):
            found["gate"] = self.gate(hidden, key)
        if self.beta is not None:
            found["beta"] = self.beta(hidden)
        if self.router is not None:
            found["route"] = self.router(hidden)
        return found

    # ---- reading ----

    def by_memory(self, x: Tensor) -> Tensor:
        """(B, H, T, D) to (B, M, R, T, D): head h reads memory h // R."""
        grouped: Tensor = x.unflatten(1, (self.memories, self.readers))
        return grouped

    def phi_q(self, q: Tensor, position: Tensor) -> Tensor:
        """Features (B, M, R, T, K) of queries (B, H, T, D)."""
        if self.spec.scaled:
            q = q * self.shape.head_dim**-0.5
        if self.map_q is not None:
            return self.by_memory(self.map_q(q, position))
        apart = [self.map_k(reader, position) for reader in self.by_memory(q).unbind(2)]
        return torch.stack(apart, dim=2) if len(apart) > 1 else apart[0].unsqueeze(2)

    def read(
        self, q: Tensor, entries: Entries, state: Tensor, route: Tensor | None = None, terraced: int = 0, one: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Entries go in, queries q (B, M, R, T, K) read: (B, M, R, T, V), and the state. `one`: one token a call, T = 1.

        `route` (B, M, T, E): weights with which each query mixes the routed memories; the shared one weighs 1.
        """
        chunked, step = self.engine
        if self.router is not None:
            q = q.repeat_interleave(self.spec.experts + 1, dim=1)
        options = {"deltas": self.spec.deltas} if self.spec.rule == "delta" else {}
        if one:
            if self.spec.rule != "delta":
                entries = tuple(None if x is None else x[:, :, 0] for x in entries)
            out, state = step(q[..., 0, :], *entries, state)
            out = out[..., None, :]
        else:
            out, state = chunked(q, *entries, state, terraced=terraced, **options)
        if self.router is not None:
            assert route is not None
            weight = torch.nn.functional.pad(route, (0, 1), value=1.0).transpose(2, 3)  # (B, M, E + 1, T)
            out = (out.unflatten(1, (self.memories, -1)) * weight[:, :, :, None, :, None]).sum(2)
        return out, state

    # ---- entering ----

    def repeated(self, x: Tensor) -> Tensor:
        """Keys or values (B, G, T, .) for each memory (B, M, T, .)."""
        return x if self.repeats == 1 else x.repeat_interleave(self.repeats, dim=1)

    def keys(self, k: Tensor, arrivals: dict[str, Tensor], position: Tensor) -> tuple[Tensor, Tensor | None]:
        """What tokens k (B, G, T, D) are written under (B, M, T, K), and their log-decays."""
        gate, kind = arrivals.get("gate"), self.spec.gate_key
        if kind == "complement":  # HGRN2: what the decay forgets is the key
            assert gate is not None
            return -torch.expm1(gate), gate
        phi = self.map_k(self.repeated(k), position)
        if isinstance(self.gate, FixedGate):
            gate = self.gate.of(phi)
        if kind == "balance":  # RWKV-6 as in RADLADS: the memory keeps its size
            assert gate is not None
            phi = phi * -torch.expm1(gate)
        elif kind == "step":  # Mamba-2: a discretised state space
            assert gate is not None
            assert isinstance(self.gate, HiddenGate)
            phi = phi * self.gate.step_size(gate)
        return phi, gate

    def entries(self, k: Tensor, v: Tensor, arrivals: dict[str, Tensor], position: Tensor, valid: Tensor | None) -> Entries:
        """The engine's arguments for tokens k (B, G, T, D), v (B, G, T, V) that enter, all or those `valid` (B, T) or (B, G, T)."""
        phi, gate = self.keys(k, arrivals, position)
        v = self.repeated(v)
        if self.spec.normalise:
            v = torch.nn.functional.pad(v, (0, 1), value=1.0)
        enters = None if valid is None else self._by_memory_or_all(valid)[..., None].to(phi.dtype)
        route, copies = arrivals.get("route"), self.spec.experts + 1
        if route is not None:
            routed = torch.nn.functional.pad((route > 0).to(phi.dtype), (0, 1), value=1.0).transpose(2, 3).flatten(1, 2)[..., None]
            if enters is not None and enters.shape[1] > 1:
                enters = enters.repeat_interleave(copies, dim=1)
            enters = routed if enters is None else routed * enters
            phi, v = phi.repeat_interleave(copies, dim=1), v.repeat_interleave(copies, dim=1)
            gate = None if gate is None else gate.repeat_interleave(copies, dim=1)
        return self._arguments(phi, v, gate, arrivals.get("beta"), enters)

    def _by_memory_or_all(self, valid: Tensor) -> Tensor:
        """`valid` (B, T) or (B, G, T) as (B, 1 or M, T)."""
        return valid[:, None] if valid.dim() == 2 else self.repeated(valid)

    def recall(self, k: Tensor, v: Tensor, arrivals: dict[str, Tensor], position: Tensor, state: Tensor) -> Tensor:
        """What the memory, as it is, gives back for tokens (B, G, n, .) under their own keys: (B, M, n, V)."""
        nothing = torch.zeros(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
        keys = self.keys(k, arrivals, position)[0][:, :, None]
        if self.spec.rule == "delta":
            keys = self._unit(keys)
        return self.read(keys, self.entries(k, v, arrivals, position, nothing), state, arrivals.get("route"))[0][:, :, 0]

    def _arguments(self, phi: Tensor, v: Tensor, gate: Tensor | None, beta: Tensor | None, enters: Tensor | None) -> Entries:
        if self.spec.decay in ("head", "fixed") and gate is not None:
            gate = gate[..., 0]
        if gate is not None and enters is not None:
            gate = gate * (enters if gate.dim() == 4 else enters[..., 0])
        if self.spec.rule == "slots":
            assert gate is not None
            return phi, v, -torch.expm1(gate), gate  # a token that does not enter has gate 0 and writes nothing
        if self.spec.rule == "additive":
            return phi if enters is None else phi * enters, v, gate
        assert beta is not None
        if self.router is not None:
            beta = beta.repeat_interleave(self.spec.experts + 1, dim=1)
        beta = beta if enters is None else beta * enters
        return self._rank_one(phi, v, gate, beta, enters) if self.spec.rank_one else self._delta(phi, v, gate, beta)

    def _delta(self, phi: Tensor, v: Tensor, gate: Tensor | None, beta: Tensor) -> Entries:
        """r = alpha k, k = beta k (a = -beta k) with k of length one; further deltas of a token go before its own, undecayed.

        The last two, which only kernels read, are that unit k and beta of the token's first delta.
        """
        keys, values = [phi], [v]
        copies = phi.shape[1] // self.memories
        for k_map, v_map in zip(self.delta_k, self.delta_v, strict=True) if self.spec.deltas > 1 else ():
            keys.append(phi @ k_map.to(phi.dtype).repeat_interleave(copies, dim=0))
            values.append(v @ v_map.to(v.dtype).repeat_interleave(copies, dim=0))
        units = [self._unit(keys[0]), *(unit(x) for x in keys[1:])]
        first = units[0] if gate is None else units[0] * (gate if gate.dim() == 4 else gate[..., None]).exp()
        key = torch.stack(units, dim=3) * beta[..., None]
        read = torch.stack([first, *units[1:]], dim=3)
        if gate is not None:
            gate = torch.stack([gate, *[torch.zeros_like(gate)] * (self.spec.deltas - 1)], dim=3).flatten(2, 3)
        return read.flatten(2, 3), None, key.flatten(2, 3), torch.stack(values, dim=3).flatten(2, 3), gate, units[0], beta[..., 0]

    def _unit(self, phi: Tensor) -> Tensor:
        """The key of a delta; a second norm would undo the epsilon of a map that has made it one."""
        return phi if MAPS[self.spec.feature_map].unit else unit(phi)

    def _rank_one(self, phi: Tensor, v: Tensor, gate: Tensor | None, rate: Tensor, enters: Tensor | None) -> Entries:
        """RWKV-7 (Peng et al. 2025, eq. 5-7): r = unit(kappa k), a = -rate r, k = k (1 + (rate - 1) key_rate)."""
        copies = phi.shape[1] // self.memories
        kappa, key_rate = (x.to(phi.dtype).repeat_interleave(copies, dim=0)[:, None] for x in (self.removal, self.key_rate))
        direction = unit(phi * kappa)
        key = phi * (1 + (rate - 1) * key_rate)
        return direction, -rate * direction, key if enters is None else key * enters, v, gate


def unit(x: Tensor) -> Tensor:
    """x / |x|, with a gradient at 0."""
    return x / x.square().sum(-1, keepdim=True).add(1e-12).sqrt()
