"""The interface of a feature map, and the maps without parameters that keep the head dimension.

Each maps x (B, heads, T, D) to phi(x) (B, heads, T, K), every head and every token on its own. Inputs are fp32 or fp64; what a
map learns is kept in fp32 with the heads as its first dimension, and takes the dtype of the input where it is used.
"""

from __future__ import annotations

try:
    import torch
    from torch import Tensor, nn
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .products import product
from .spec import MixerSpec
from .spec_maps import map_width

FLOOR = 1e-6  # of a norm that divides


class FeatureMap(nn.Module):
    """phi of `heads` heads of `dim` channels; `width` is K, `columns` what a learned projection makes of the channels."""

    def __init__(self, heads: int, dim: int, spec: MixerSpec, role: str) -> None:
        super().__init__()
        if role not in ("q", "k"):
            raise ValueError(f"a feature map maps 'q' or 'k', got '{role}'")
        feature_dim = 0 if spec.rule == "slots" else spec.feature_dim  # there it counts the slots
        self.heads, self.dim, self.role = heads, dim, role
        self.columns = feature_dim or dim
        self.width = map_width(spec.feature_map, dim, feature_dim)

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        """`position` (B or 1, T) int64 is the index of each token in its own text."""
        raise NotImplementedError


def identity_start(heads: int, dim: int, columns: int) -> nn.Parameter:
    """W (heads, dim, columns) that takes the leading channels as they are: Wx is [x, 0], or the start of x."""
    start = torch.zeros(heads, dim, columns, dtype=torch.float32)
    start.diagonal(dim1=1, dim2=2).fill_(1.0)  # torch.eye takes twenty times as long where a model is loaded, on the meta device
    return nn.Parameter(start)


def project(x: Tensor, weight: Tensor) -> Tensor:
    """Wx of every head: (B, heads, T, dim) times (heads, dim, columns)."""
    return product(x, weight.to(x.dtype))


def norm(x: Tensor) -> Tensor:
    """max(||x||, 1e-6) over the last dimension, which stays; the gradient at 0 is 0."""
    return x.square().sum(-1, keepdim=True).clamp(min=FLOOR**2).sqrt()


class Identity(FeatureMap):
    """phi(x) = x."""

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        return x


class L2Norm(FeatureMap):
    """phi(x) = x / max(||x||, 1e-6) (keys of DeltaNet, Yang et al. 2024, arXiv 2406.06484)."""

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        return x / norm(x)


class Unit(FeatureMap):
    """phi(x) = x / sqrt(||x||^2 + 1e-6): as transformers and fla norm queries and keys of their own layers."""

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        return x * (x.square().sum(-1, keepdim=True) + FLOOR).rsqrt()


class Elu1(FeatureMap):
    """phi(x) = elu(x) + 1 (Katharopoulos et al. 2020, eq. 7)."""

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        return nn.functional.elu(x) + 1


class Relu(FeatureMap):
    """phi(x) = relu(x)."""

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        return x.relu()


class Softmax(FeatureMap):
    """phi(x) = softmax over the head dimension (Liger, section 3.2)."""

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        return x.softmax(-1)
