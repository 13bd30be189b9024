"""What the far memory computes of a token when it arrives and applies when it enters: log-decay, delta rate, route.

Each is (B, M, T, width) for M memories; see `MixerSpec.arrivals` for the widths.
"""

from __future__ import annotations

import math

try:
    import torch
    from torch import Tensor, nn
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .native import WIDTH, takes
from .native_ops import log_sigmoid as native_log_sigmoid
from .spec import MixerSpec, Shape

OPEN = 4.0  # bias that starts a sigmoid gate at alpha = 0.982


class Projection(nn.Module):
    """y = W x + b of the layer's input, `width` values a head, (B, heads, T, width); W of low rank where `rank` says so.

    The last factor starts at zero, so that y = b at first; `bias` None is none.
    """

    def __init__(self, hidden: int, heads: int, width: int, rank: int = 0, bias: float | None = 0.0) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.down = nn.Parameter(torch.empty(rank, hidden, dtype=torch.float32)) if rank else None
        self.up = nn.Parameter(torch.zeros(heads * width, rank or hidden, dtype=torch.float32))
        self.bias = None if bias is None else nn.Parameter(torch.full((heads * width,), bias, dtype=torch.float32))
        if self.down is not None:
            nn.init.orthogonal_(self.down)

    def linear(self, hidden: Tensor | None) -> Tensor:
        """W x (B, T, heads width)."""
        if hidden is None:
            raise ValueError("a data-dependent mixer needs the layer's input")
        x = hidden if self.down is None else hidden @ self.down.to(hidden.dtype).T
        return x @ self.up.to(x.dtype).T

    def project(self, hidden: Tensor | None) -> Tensor:
        return self.apart(self.linear(hidden))

    def apart(self, y: Tensor) -> Tensor:
        """y + b (B, heads, T, width) of y = W x."""
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        found: Tensor = y.unflatten(-1, (self.heads, self.width))
        return found.transpose(1, 2)


class KeyGate(nn.Module):
    """alpha = sigmoid(k)^(1/divisor), k before RoPE: no new parameter (Liger, section 3.2)."""

    def __init__(self, spec: MixerSpec, shape: Shape) -> None:
        super().__init__()
        self.divisor = spec.gate_divisor
        self.repeats = spec.memories(shape) // shape.kv_heads

    def forward(self, hidden: Tensor | None, key: Tensor) -> Tensor:
        return (nn.functional.logsigmoid(key) / self.divisor).repeat_interleave(self.repeats, dim=1)


class FixedGate(nn.Module):
    """One constant a memory; starts as RetNet's 1 - 2^(-5 - h) (Sun et al. 2023, eq. 8)."""

    log_decay: Tensor

    def __init__(self, spec: MixerSpec, shape: Shape) -> None:
        super().__init__()
        head = torch.arange(spec.memories(shape), dtype=torch.float32)
        self.register_buffer("log_decay", torch.log1p(-torch.exp2(-5 - head)))

    def of(self, key: Tensor) -> Tensor:
        """(B, M, T, 1) for entering keys (B, M, T, K)."""
        return self.log_decay.to(key.dtype)[:, None, None].expand(*key.shape[:3], 1)


class HiddenGate(Projection):
    """alpha of the layer's input x, y = W x + b, a memory or a channel:

    sigmoid: log alpha = log sigmoid(y) / divisor (GLA, Yang et al. 2024, section 4.4); softplus: log alpha = -e^A softplus(y)
    (Mamba-2, Dao & Gu 2024, section 7; Gated DeltaNet); rwkv: log alpha = -e^(-1/2) sigmoid(y) (RWKV-7, Peng et al. 2025, eq. 4).
    Where the decay is complex, the second half of y are angles (GateLoop, Katsch 2023, eq. 4).
    """

    def __init__(self, spec: MixerSpec, shape: Shape) -> None:
        width = spec.arrivals(shape)["gate"]
        super().__init__(shape.hidden_size, spec.memories(shape), width, spec.gate_rank, bias=OPEN)
        self.divisor, self.form, self.complex = spec.gate_divisor, spec.gate_form, spec.decay == "complex"
        self.a_log = nn.Parameter(torch.zeros(self.heads, dtype=torch.float32)) if self.form == "softplus" else None
        if self.complex and self.bias is not None:
            self.bias.data.view(self.heads, 2, -1)[:, 1] = 0.0

    def forward(self, hidden: Tensor | None, key: Tensor) -> Tensor:
        y = self.linear(hidden)
        if self.form == "sigmoid" and not self.complex and self.width % WIDTH == 0 and takes(y, self.bias):
            return native_log_sigmoid(y, self.bias, self.heads, self.divisor)
        y = self.apart(y)
        if not self.complex:
            return self.log_alpha(y)
        size, angle = y.chunk(2, dim=-1)
        return torch.cat([self.log_alpha(size), angle], dim=-1)

    def log_alpha(self, y: Tensor) -> Tensor:
        if self.form == "softplus":
            return -self.rate(y) * nn.functional.softplus(y)
        if self.form == "rwkv":
            return -math.exp(-0.5) * torch.sigmoid(y)
        return nn.functional.logsigmoid(y) / self.divisor

    def rate(self, like: Tensor) -> Tensor:
        assert self.a_log is not None
        return self.a_log.to(like.dtype).exp()[:, None, None]

    def step_size(self, log_alpha: Tensor) -> Tensor:
        """softplus(y) of a log-decay: the step size of a discretised state space."""
        return -log_alpha / self.rate(log_alpha)


class Beta(Projection):
    """beta = sigmoid(W x + b), twice that where negative eigenvalues are allowed (Grazzi et al. 2024): rates of delta updates."""

    def __init__(self, spec: MixerSpec, shape: Shape) -> None:
        width = spec.arrivals(shape)["beta"]
        rank = spec.gate_rank if spec.rank_one else 0
        super().__init__(shape.hidden_size, spec.memories(shape), width, rank, bias=0.0 if spec.gate_bias else None)
        self.top = 2.0 if spec.negative else 1.0

    def forward(self, hidden: Tensor | None) -> Tensor:
        return self.top * torch.sigmoid(self.project(hidden))


class Router(Projection):
    """Weights of the routed memories of each token: the `active` largest of a softmax, the rest 0 (MoM, Du et al. 2025, eq. 5)."""

    def __init__(self, spec: MixerSpec, shape: Shape) -> None:
        super().__init__(shape.hidden_size, spec.memories(shape), spec.experts)
        self.active = spec.active
        nn.init.normal_(self.up, std=shape.hidden_size**-0.5)  # at zero every token would take the same memories

    def forward(self, hidden: Tensor | None) -> Tensor:
        share = self.project(hidden).softmax(-1)
        chosen = share.topk(self.active, dim=-1)
        kept = torch.zeros_like(share).scatter(-1, chosen.indices, chosen.values)
        return kept / kept.sum(-1, keepdim=True)


GATES: dict[str, type[KeyGate] | type[HiddenGate] | type[FixedGate]] = {
    "key": KeyGate,
    "fixed": FixedGate,
    "head": HiddenGate,
    "channel": HiddenGate,
    "complex": HiddenGate,
}
