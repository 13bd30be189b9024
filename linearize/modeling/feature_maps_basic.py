"""Feature maps that learn nothing, or one matrix a head: identity, elu1, softmax (Liger), Hedgehog.

Each maps x (B, heads, T, D) to phi(x) (B, heads, T, K); feature maps compute in at least fp32.
"""

from __future__ import annotations

try:
    import torch
    from torch import Tensor, nn
except ImportError as error:
    raise ImportError("linearize models need torch") from error


class FeatureMap(nn.Module):
    """phi of one head after another; `width` is K."""

    def __init__(self, heads: int, dim: int, feature_dim: int) -> None:
        super().__init__()
        self.heads, self.dim, self.width = heads, dim, dim

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Identity(FeatureMap):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Elu1(FeatureMap):
    """phi(x) = elu(x) + 1 (Katharopoulos et al. 2020, eq. 7)."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.elu(x) + 1


class Softmax(FeatureMap):
    """phi(x) = softmax over the head dimension (Liger, section 3.2)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(-1)


class Hedgehog(FeatureMap):
    """phi(x) = [softmax(Wx), softmax(-Wx)], W of each head starting at the identity (Hedgehog 2024, section 4; stable form)."""

    def __init__(self, heads: int, dim: int, feature_dim: int) -> None:
        super().__init__(heads, dim, feature_dim)
        columns = feature_dim or dim
        self.weight = nn.Parameter(torch.eye(dim, columns, dtype=torch.float32).repeat(heads, 1, 1))
        self.width = 2 * columns

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.to(x.dtype)
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], dim=-1)


FEATURE_MAPS: dict[str, type[FeatureMap]] = {
    "identity": Identity,
    "elu1": Elu1,
    "softmax": Softmax,
    "hedgehog": Hedgehog,
}
