"""MoM: mixture of memories (Du et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from linearize.errors import InputError
from linearize.methods.base import Method, option
from linearize.methods.families import recurrent
from linearize.modeling.spec import MixerSpec

OVER: dict[str, dict[str, Any]] = {
    "gated-deltanet": {"rule": "delta", "feature_map": "l2norm", "decay": "head", "gate_form": "softplus"},
    "gla": {"feature_map": "identity", "scaled": True, "decay": "channel", "gate_rank": 16},
    "deltanet": {"rule": "delta", "feature_map": "l2norm"},
    "additive": {"feature_map": "identity", "scaled": True},
}


@dataclass(frozen=True)
class Mom(Method):
    """Mixture of memories: each token enters a shared memory and the two of four that a router chooses."""

    paper = "https://arxiv.org/abs/2502.13685"
    limits = "memories share the model's own key and value projections, in the paper each has its own"

    over: str = option("gated-deltanet", "how a memory is updated: gated-deltanet, gla, deltanet or additive")

    def mixer(self) -> MixerSpec:
        if self.over not in OVER:
            raise InputError(f"over must be one of {', '.join(OVER)}, got '{self.over}'", "--set", "--set over=gated-deltanet")
        return recurrent(**OVER[self.over], experts=4, active=2, far_rope=False, out_gate="silu")
