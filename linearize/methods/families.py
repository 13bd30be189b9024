"""What several methods share: layers that are a memory alone, half windows, shared denominators, patterns over layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from linearize import methods
from linearize.methods.base import Method, Stage, option
from linearize.modeling.spec import MixerSpec, Shape

if TYPE_CHECKING:
    from linearize.methods.calibration import Calibration
    from linearize.modeling.mixer import Mixer

CONV = "taps of the convolution on q, k and v; 0 is none"
NO_NEW_PARAMETERS = (Stage("lora", 2_000_000, 1e-4, loss="kl"),)


def kernel(feature_map: str, **axes: Any) -> MixerSpec:
    """Linear attention: a memory of all tokens under a positive feature map, read with its denominator."""
    return MixerSpec(feature_map=feature_map, merge="far", coverage="all", **axes)


def recurrent(feature_map: str = "identity", *, norm: str = "rms", conv: int = 0, **axes: Any) -> MixerSpec:
    """A memory of all tokens, read without a denominator, its output normed; a convolution is on q, k and v, with SiLU."""
    short = {"conv": conv, "conv_v": True, "conv_silu": True, **axes} if conv else axes
    return kernel(feature_map, normalise=False, norm=norm, **short)


@dataclass(frozen=True)
class HalfWindow(Method):
    """Half softmax window, half a memory gated by the key projection (Liger, Lan et al. 2025, section 3.2)."""

    paper = "https://arxiv.org/abs/2503.01496"
    stages = (Stage("lora", 2_000_000, 1e-3, loss="ce", targets=("q", "k", "v")),)

    near_weight: float = option(0.5, "share of the window in the sum")

    def half(self, **axes: Any) -> MixerSpec:
        return MixerSpec(
            share_kv=True, decay="key", coverage="all", normalise=False, window=64, merge="sum", near_weight=self.near_weight,
            far_rope=False, **axes,
        )  # fmt: skip


@dataclass(frozen=True)
class SharedDenominator(Method):
    """Softmax window and Hedgehog memory of all older tokens under one denominator (LoLCATs, Zhang et al. 2024b, eq. 6)."""

    stages = (Stage("attention", 1_000_000, 1e-2, loss="mse"), Stage("lora", 1_000_000, 1e-4, loss="ce"))

    feature_dim: int = option(0, "columns of W; 0 is the head dimension, so that the identity start is whole")

    def mixer(self) -> MixerSpec:
        return MixerSpec(feature_map="hedgehog", feature_dim=self.feature_dim, window=64, far_mass="head")

    def published(self, mixer: Mixer, calibration: Calibration) -> None:
        from linearize.methods import starts

        starts.constant_far_mass(mixer, 2.3026)  # gamma = 0.1 on the window is 1 / gamma on the memory


@dataclass(frozen=True)
class Exportable(Method):
    """A method whose layer transformers has too, up to details: with `native` it takes them from there."""

    native: bool = option(False, "transformers' own layer to the letter, so that linearize export can write it")

    def as_native(self, spec: MixerSpec, **details: Any) -> MixerSpec:
        """Where `native` is asked for: projections as they are, gates without biases, and the method's own details."""
        return replace(spec, far_norm=False, gate_bias=False, **details) if self.native else spec

    def calibrated(self, spec: MixerSpec) -> MixerSpec:
        """Transformers' convolutions are never without their SiLU."""
        return replace(super().calibrated(spec), conv_silu=self.native and spec.conv_silu)

    def within(self, spec: MixerSpec, shape: Shape, norm_eps: float) -> MixerSpec:
        """Transformers' layers take the epsilon of the model's norms."""
        return replace(spec, norm_eps=norm_eps) if self.native else spec


@dataclass(frozen=True)
class Hybrid(Method):
    """A pattern over the layers under a name; its stages are its first member's where it has none of its own."""

    stages: ClassVar[tuple[Stage, ...]] = ()

    def mixer(self) -> MixerSpec:
        """That of the first member."""
        return methods.get(self.pattern[0])().mixer()
