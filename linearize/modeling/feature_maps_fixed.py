"""Feature maps that are set once and not learned: cosFormer, FAVOR+, log-normal, norm-aware and focused."""

from __future__ import annotations

import math

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .feature_maps_basic import FLOOR, FeatureMap, norm
from .spec import MixerSpec

EXPONENT = 30.0
SEED = 20200930


class Cosformer(FeatureMap):
    """phi(x_i) = [relu(x) sin(a), relu(x) cos(a)], a = pi i / 2M, M = max_length (cosFormer, Qin et al. 2022, section 3).

    So phi(q_i) . phi(k_j) = relu(q) . relu(k) cos(pi (i - j) / 2M). The check of the length waits for the device.
    """

    def __init__(self, heads: int, dim: int, spec: MixerSpec, role: str) -> None:
        super().__init__(heads, dim, spec, role)
        self.max_length = spec.max_length

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        if position is None:
            raise ValueError("cosformer needs the position of each token")
        if not position.is_meta and bool((position >= self.max_length).any()):
            raise ValueError(f"a text of more than {self.max_length} tokens: cosformer was built for max_length={self.max_length}")
        angle = position[:, None, :, None].to(x.dtype) * (math.pi / (2 * self.max_length))
        x = x.relu()
        return torch.cat([x * angle.sin(), x * angle.cos()], dim=-1)


def orthogonal_directions(dim: int, count: int, seed: int) -> Tensor:
    """(dim, count) columns, orthogonal in blocks of `dim`, each of a Gaussian vector's length (Choromanski 2021, section 2.4)."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def gaussian(columns: int) -> Tensor:
        return torch.randn(dim, columns, generator=generator, dtype=torch.float64, device="cpu")

    blocks = []
    for _ in range(math.ceil(count / dim)):
        q, r = torch.linalg.qr(gaussian(dim))
        blocks.append(q * r.diagonal().sign())
    directions: Tensor = torch.cat(blocks, dim=1)[:, :count] * torch.linalg.vector_norm(gaussian(count), dim=0)
    return directions


class Performer(FeatureMap):
    """FAVOR+ (Choromanski et al. 2021, lemma 1): E phi(q) . phi(k) = exp(q . k / sqrt(D)).

    phi(x) = exp(+-w_i . y - ||y||^2 / 2) / sqrt(2n), y = x / D^1/4, over n directions w_i with both signs; exponents are cut
    at 30. The directions are drawn from a seed for each head, the same for queries and keys, without touching torch's own
    generator. Query heads that share a memory must share its directions, so with share_kv all heads have one draw.
    """

    projection: Tensor

    def __init__(self, heads: int, dim: int, spec: MixerSpec, role: str) -> None:
        super().__init__(heads, dim, spec, role)
        device = torch.get_default_device()
        if device.type == "meta":
            projection = torch.empty(heads, dim, self.columns, dtype=torch.float32, device=device)
        else:
            seeds = [SEED + (0 if spec.share_kv else head) for head in range(heads)]
            directions = torch.stack([orthogonal_directions(dim, self.columns, seed) for seed in seeds])
            projection = directions.to(device, torch.float32)
        self.register_buffer("projection", projection)

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        x = x * self.dim**-0.25
        y = x @ self.projection.to(x.dtype)
        half = x.square().sum(-1, keepdim=True) / 2
        exponent = torch.cat([y - half, -y - half], dim=-1)
        return exponent.clamp(max=EXPONENT).exp() / math.sqrt(2 * self.columns)


class LogNormal(FeatureMap):
    """phi(x) = exp(scale * x), the exponent cut to +-30 (Nahshan et al. 2024, arXiv 2311.13541: alpha of queries, beta of keys).

    `scale` of each head is a constant: 1 until moment matching sets it from the spread of queries and keys.
    """

    scale: Tensor

    def __init__(self, heads: int, dim: int, spec: MixerSpec, role: str) -> None:
        super().__init__(heads, dim, spec, role)
        self.register_buffer("scale", torch.ones(heads, dtype=torch.float32))

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        return (x * self.scale.to(x.dtype)[:, None, None]).clamp(-EXPONENT, EXPONENT).exp()


class NormAware(FeatureMap):
    """Both signs apart, the norm of a query as a power of its direction (NaLaFormer, Meng et al. 2025, arXiv 2506.21137).

    phi(q) = [relu(u)^p, relu(-u)^p] with u = q / ||q|| and p = 3 (1/2 + tanh ||q||); phi(k) = [relu(k)^3, relu(-k)^3]. The base
    of p is at least 1e-6, where its logarithm is finite.
    """

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        if self.role == "k":
            return torch.cat([x.relu() ** 3, (-x).relu() ** 3], dim=-1)
        length = norm(x)
        unit = x / length
        return torch.cat([unit, -unit], dim=-1).clamp(min=FLOOR) ** (3 * (0.5 + length.tanh()))


class Focused(FeatureMap):
    """phi(x) = ||y|| y^3 / ||y^3||, y = relu(x) + 1e-6 (FLatten Transformer, Han et al. 2023, section 4, p = 3)."""

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        y = x.relu() + FLOOR
        cube = (y / y.detach().amax(-1, keepdim=True)) ** 3  # y^3 / ||y^3|| is the same for every multiple of y
        return norm(y) * cube / norm(cube)
