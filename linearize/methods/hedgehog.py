"""Hedgehog: learned softmax feature maps, no window (Zhang et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from linearize.methods.base import Method, Stage, option
from linearize.methods.families import kernel
from linearize.modeling.spec import MixerSpec

FORMS = {"softmax": "hedgehog", "exp": "hedgehog_exp", "joint": "hedgehog_joint"}


@dataclass(frozen=True)
class Hedgehog(Method):
    """Learned feature maps phi(x) = [softmax(Wx), softmax(-Wx)] for each head, trained to give the teacher's weights."""

    paper = "https://arxiv.org/abs/2402.04347"
    stages = (Stage("attention", 1_000_000, 1e-2, loss="weights"), Stage("lora", 1_000_000, 1e-4))

    form: str = option("softmax", "softmax (each half apart), exp, or joint (one softmax over both, as in fla)")
    feature_dim: int = option(0, "columns of W; 0 is the head dimension")

    def mixer(self) -> MixerSpec:
        return kernel(FORMS.get(self.form, self.form), feature_dim=self.feature_dim)
