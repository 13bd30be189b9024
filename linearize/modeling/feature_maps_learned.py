"""Feature maps whose parameters are learned: T2R, the feed-forward kernel, and the second-degree maps of Based and ReBased."""

from __future__ import annotations

import math

try:
    import torch
    from torch import Tensor, nn
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .feature_maps_basic import FeatureMap, identity_start, project
from .spec import MixerSpec

BIAS = 0.1


def signed_start(heads: int, dim: int, columns: int) -> nn.Parameter:
    """W (heads, dim, columns) = [I, -I, I, ...] cut to `columns`: the identity, then what a one-sided map loses of it.

    Columns of zeros would all get the same gradient and stay equal to each other.
    """
    blocks = [torch.eye(dim, dtype=torch.float32) * (-1.0) ** i for i in range(math.ceil(columns / dim))]
    return nn.Parameter(torch.cat(blocks, dim=1)[:, :columns].repeat(heads, 1, 1))


class T2R(FeatureMap):
    """phi(x) = relu(Wx + b) (Kasai et al. 2021, section 2), started at W = [I, -I, ...] and b = 0.1.

    With b > 0 every feature is above 0 and has a gradient at x = 0, and no denominator starts as 0 / 0.
    """

    def __init__(self, heads: int, dim: int, spec: MixerSpec, role: str) -> None:
        super().__init__(heads, dim, spec, role)
        self.weight = signed_start(heads, dim, self.columns)
        self.bias = nn.Parameter(torch.full((heads, self.columns), BIAS, dtype=torch.float32))

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        return (project(x, self.weight) + self.bias.to(x.dtype)[:, None]).relu()


class Feedforward(FeatureMap):
    """Two gated layers a head (Yorsh & Kovalenko 2022, arXiv 2211.04076: gated linear layers with a softplus in the last).

    h = Ax * 2 sigmoid(Bx), phi(x) = softplus(Wh) * 2 sigmoid(Vh). The paper starts at orthogonal A and W; here they start at the
    identity and the gates' B and V at 0, so that phi starts as softplus(x). The factor 2 makes such a gate 1.
    """

    def __init__(self, heads: int, dim: int, spec: MixerSpec, role: str) -> None:
        super().__init__(heads, dim, spec, role)
        self.hidden = identity_start(heads, dim, dim)
        self.hidden_gate = nn.Parameter(torch.zeros(heads, dim, dim, dtype=torch.float32))
        self.weight = signed_start(heads, dim, self.columns)
        self.gate = nn.Parameter(torch.zeros(heads, dim, self.columns, dtype=torch.float32))

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        h = project(x, self.hidden) * 2 * project(x, self.hidden_gate).sigmoid()
        return nn.functional.softplus(project(h, self.weight)) * 2 * project(h, self.gate).sigmoid()


def monomials(x: Tensor) -> tuple[Tensor, Tensor]:
    """x_i^2, and x_i x_j for i < j."""
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], offset=1, device=x.device)
    return x.square(), x.index_select(-1, i) * x.index_select(-1, j)


class Taylor(FeatureMap):
    """phi(q) . phi(k) = 1 + s + s^2 / 2 with s = q' . k' / sqrt(d'): e^s to second degree (Based, Arora et al. 2024, section 4).

    phi(x) = [1, x' / d'^1/4, x'_i^2 / sqrt(2 d'), x'_i x'_j / sqrt(d') for i < j] of x' = Wx with d' channels, W starting at the
    identity. The features have both signs, their products are at least 1/2.
    """

    def __init__(self, heads: int, dim: int, spec: MixerSpec, role: str) -> None:
        super().__init__(heads, dim, spec, role)
        self.weight = identity_start(heads, dim, self.columns)

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        x = project(x, self.weight)
        squares, pairs = monomials(x)
        root = math.sqrt(self.columns)
        return torch.cat([torch.ones_like(x[..., :1]), x / math.sqrt(root), squares / (math.sqrt(2) * root), pairs / root], dim=-1)


class Rebased(FeatureMap):
    """phi(q) . phi(k) = (q' . k')^2 / d' with x' = gamma * LayerNorm(Wx) + beta (ReBased, Aksenov et al. 2024, arXiv 2402.10644).

    phi(x) = [x'_i^2, sqrt(2) x'_i x'_j for i < j] / sqrt(d'), starting at W = I, gamma = 1, beta = 0. The features have both
    signs, their products are squares.
    """

    def __init__(self, heads: int, dim: int, spec: MixerSpec, role: str) -> None:
        super().__init__(heads, dim, spec, role)
        self.weight = identity_start(heads, dim, self.columns)
        self.gamma = nn.Parameter(torch.ones(heads, self.columns, dtype=torch.float32))
        self.beta = nn.Parameter(torch.zeros(heads, self.columns, dtype=torch.float32))

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        x = nn.functional.layer_norm(project(x, self.weight), (self.columns,))
        x = x * self.gamma.to(x.dtype)[:, None] + self.beta.to(x.dtype)[:, None]
        squares, pairs = monomials(x)
        return torch.cat([squares, math.sqrt(2) * pairs], dim=-1) / math.sqrt(self.columns)
