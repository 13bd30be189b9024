"""Causal depthwise convolution over time, for one part of the far half; its state is the last (kernel - 1) inputs."""

from __future__ import annotations

try:
    import torch
    from torch import Tensor, nn
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .native import WIDTH, takes
from .native_ops import TAPS
from .native_ops import convolution as native_convolution


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    """y_t = sum_i w_i x_{t+i} (B, h, T, D) of x (B, h, T + n - 1, D) and w (n, h, D)."""
    count, time = len(weight), x.shape[2] - len(weight) + 1
    if count <= TAPS and x.shape[-1] % WIDTH == 0 and takes(x, weight):
        return native_convolution(x, weight)
    taps = weight[:, :, None]
    return sum((x[:, :, i : i + time] * taps[i] for i in range(1, count)), x[:, :, :time] * taps[0])


class CausalConv(nn.Module):
    """y_t = sum_i w_i x_{t-n+1+i} for each head and channel; starts as the identity (LAWCAT, section 3)."""

    def __init__(self, heads: int, dim: int, kernel: int) -> None:
        super().__init__()
        weight = torch.zeros(kernel, heads, dim, dtype=torch.float32)
        weight[-1] = 1.0
        self.weight = nn.Parameter(weight)

    @property
    def history(self) -> int:
        return self.weight.shape[0] - 1

    def forward(self, x: Tensor, past: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, h, T, D) after `past` (B, h, n - 1, D) inputs; returns y and the last n - 1 real inputs of each row."""
        batch, heads, time, dim = x.shape
        if past is None:
            past = x.new_zeros(batch, heads, self.history, dim)
        joined = torch.cat([past.to(x.dtype), x], dim=2)
        y = convolved(joined, self.weight.to(x.dtype))
        if lengths is None:
            return y, joined[:, :, time:].clone(memory_format=torch.contiguous_format)  # a view would keep the whole call alive
        index = lengths[:, None] + torch.arange(self.history, device=x.device)
        return y, joined.gather(2, index[:, None, :, None].expand(-1, heads, -1, dim))
