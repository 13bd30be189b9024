"""Log-decays of the far memory, computed when a token arrives and applied when it enters."""

from __future__ import annotations

try:
    import torch
    from torch import Tensor, nn
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .spec import MixerSpec, Shape


def log_sigmoid(x: Tensor, divisor: float) -> Tensor:
    """log sigmoid(x) / divisor: the GLA gate (Yang et al. 2024, section 4.4)."""
    return nn.functional.logsigmoid(x) / divisor


class Gate(nn.Module):
    """No decay. Subclasses return log-decays (B, M, T) a head or (B, M, T, K) a channel."""

    def forward(self, hidden: Tensor | None, key: Tensor) -> Tensor | None:
        return None


class KeyGate(Gate):
    """alpha = sigmoid(k)^(1/divisor), k before RoPE: no new parameter (Liger, section 3.2)."""

    def __init__(self, spec: MixerSpec, shape: Shape) -> None:
        super().__init__()
        self.divisor = spec.gate_divisor
        self.repeats = spec.memories(shape) // shape.kv_heads

    def forward(self, hidden: Tensor | None, key: Tensor) -> Tensor:
        return log_sigmoid(key, self.divisor).repeat_interleave(self.repeats, dim=1)


class HiddenGate(Gate):
    """alpha = sigmoid(W x + b)^(1/divisor) of the layer's input x; W of low rank where `gate_rank` says so."""

    def __init__(self, spec: MixerSpec, shape: Shape) -> None:
        super().__init__()
        self.memories, self.width = spec.memories(shape), spec.gate_width(shape)
        self.divisor, self.scalar = spec.gate_divisor, spec.decay == "head"
        outputs = self.memories * self.width
        rank = spec.gate_rank
        self.down = nn.Parameter(torch.empty(rank, shape.hidden_size, dtype=torch.float32)) if rank else None
        self.up = nn.Parameter(torch.zeros(outputs, rank or shape.hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.full((outputs,), 4.0, dtype=torch.float32))
        if self.down is not None:
            nn.init.orthogonal_(self.down)

    def forward(self, hidden: Tensor | None, key: Tensor) -> Tensor:
        if hidden is None:
            raise ValueError("a data-dependent gate needs the layer's input")
        x = hidden.to(key.dtype)
        if self.down is not None:
            x = x @ self.down.to(x.dtype).T
        logits = x @ self.up.to(x.dtype).T + self.bias.to(x.dtype)
        batch, time, _ = logits.shape
        gate = log_sigmoid(logits, self.divisor).view(batch, time, self.memories, self.width).transpose(1, 2)
        return gate.squeeze(-1) if self.scalar else gate


GATES: dict[str, type[Gate]] = {"key": KeyGate, "head": HiddenGate, "channel": HiddenGate}


def make_gate(spec: MixerSpec, shape: Shape) -> Gate:
    if spec.decay == "none" or not spec.has_far:
        return Gate()
    return GATES[spec.decay](spec, shape)
