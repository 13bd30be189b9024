"""What happens to the far memory's output before the merge: skip, norm, gate, map; each a head."""

from __future__ import annotations

try:
    import torch
    from torch import Tensor, nn
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .gates import Projection
from .spec import MixerSpec, Shape

SILU_ONE = 1.2784645  # silu of this is 1
SIGMOID_OPEN = 4.0


class FarOutput(nn.Module):
    """y = W (norm(o + skip v) * gate(x)), or W norm((o + skip v) * gate(x)): RMS or group norm with a weight.

    All start as near to y = o as they can.
    """

    def __init__(self, spec: MixerSpec, shape: Shape) -> None:
        super().__init__()
        heads, width = shape.heads, shape.value_dim
        self.norm, self.epsilon, self.groups = spec.norm, spec.norm_eps, heads // shape.kv_heads
        self.activation, self.gate_first = spec.out_gate, spec.gate_first
        self.weight = nn.Parameter(torch.ones(heads, width)) if spec.norm != "none" else None
        self.skip = nn.Parameter(torch.zeros(heads)) if spec.skip else None
        self.map = nn.Parameter(torch.eye(width).repeat(heads, 1, 1)) if spec.out_map else None
        self.open = SILU_ONE if spec.out_gate == "silu" else SIGMOID_OPEN  # what an open gate's projection gives
        bias = self.open if spec.gate_bias else None
        self.gate = Projection(shape.hidden_size, heads, width, spec.gate_rank, bias) if spec.out_gate != "none" else None

    @property
    def plain(self) -> bool:
        """Whether y = o."""
        return self.norm == "none" and self.skip is None and self.map is None and self.gate is None

    def forward(self, out: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
        """out (B, H, T, V), the tokens' own values v (B, G, T, V) and the layer's input (B, T, C)."""
        if self.skip is not None:
            out = out + self.skip.to(out.dtype)[:, None, None] * v.repeat_interleave(self.groups, dim=1)
        out = self._normed(self._gated(out, hidden)) if self.gate_first else self._gated(self._normed(out), hidden)
        return out if self.map is None else out @ self.map.to(out.dtype)

    def _normed(self, out: Tensor) -> Tensor:
        if self.norm == "group":
            out = out - out.mean(-1, keepdim=True)
        if self.norm != "none":
            out = out * (out.square().mean(-1, keepdim=True) + self.epsilon).rsqrt()
        return out if self.weight is None else out * self.weight.to(out.dtype)[:, None]

    def _gated(self, out: Tensor, hidden: Tensor | None) -> Tensor:
        if self.gate is None:
            return out
        y = self.gate.project(hidden)
        return out * (nn.functional.silu(y) if self.activation == "silu" else torch.sigmoid(y))
