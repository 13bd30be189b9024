"""What a conversion and its training take on this machine, from the plan alone: memory, disk, and the time of each stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from linearize.conversion.plan import Plan
from linearize.conversion.streaming import (
    CALIBRATION_ROWS,
    MLP_MATRICES,
    RANKED_LENGTH,
    activation_bytes,
    calibration_shape,
    expert_width,
    tensor_sizes,
    tokens_at_once,
)
from linearize.methods.base import Stage
from linearize.methods.layout import stages_of

START, RANK, COMMON_LENGTH = "start", "rank", 1024
# of one forward pass of the teacher over as many tokens, logits included in rank's, lora's and long's, which is lora's; measured by
# recipes/stage_costs.py
COSTS = {RANK: 1.4, START: 4.0, "attention": 2.5, "lora": 4.5, "long": 4.5}
WITH_LOGITS = (RANK, "lora", "long")
MIXER_BYTES = 4  # a parameter: new ones are stored in fp32


@dataclass(frozen=True)
class Estimates:
    """Bytes, and seconds to within a factor of two.

    `peak_bytes` is beside Python and its libraries, `rate` the FLOP/s of matrix products in `dtype`.
    """

    peak_bytes: int
    disk_bytes: int
    free_bytes: int  # while it is written
    dtype: str
    rate: float
    seconds: Mapping[str, float]
    tokens: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def estimate(
    plan: Plan, dtype: str = "auto", device: str = "auto", rate: float | None = None, stages: Sequence[Stage] = ()
) -> Estimates:
    """Estimates for the weights in `dtype` on `device`. `rate` (FLOP/s) is measured for a fifth of a second unless given.

    Of the `stages` of a recipe, or the method's own.
    """
    from linearize.devices import matmul_rate, pick_device, pick_dtype

    on = pick_device(device)
    stored = pick_dtype(dtype, plan.source.stored_dtype, on)
    rate = rate or matmul_rate(stored, on)
    weights = stored.itemsize * sum(tensor_sizes(plan.source, plan.architecture))
    added = MIXER_BYTES * plan.parameters_added
    start = prod(calibration_shape(plan.mixers))
    wanted = stages or stages_of(plan.method)
    tokens = {START: start} | {s.kind: s.tokens for s in wanted}
    lengths = {s.kind: s.sequence or COMMON_LENGTH for s in wanted}
    if plan.keeps:  # the model runs as it is, then with each layer swapped
        tokens = {RANK: CALIBRATION_ROWS * RANKED_LENGTH * (len(plan.parts) + 1)} | tokens
    seconds = {
        kind: count * COSTS[kind] * forward_flops(plan, kind in WITH_LOGITS, lengths.get(kind, COMMON_LENGTH)) / rate
        for kind, count in tokens.items()
    }
    mlp = plan.architecture.mlp_width(plan.source.config)
    held = weights + added + activation_bytes(plan.shape, mlp, tokens_at_once(plan.mixers))
    unpacked = 2 * weights if plan.source.format == "gguf" else 0  # all of its tensors, then the model's
    peak = plan.route.peak_bytes or max(held, unpacked)
    name = str(stored).removeprefix("torch.")
    return Estimates(peak, weights + added, 2 * weights, name, rate, seconds, tokens)


def forward_flops(plan: Plan, logits: bool, length: int = COMMON_LENGTH) -> float:
    """Floating-point operations of the teacher's forward pass a token, in rows of `length` tokens.

    2 (2 H + 2 G) C D + 4 T H D for attention and 2 * 3 C F for the feed-forward of each layer, of the active experts where
    there are some; 2 C V for logits.
    """
    config, shape, family = plan.source.config, plan.shape, plan.architecture
    experts = int(config.get("num_experts_per_tok") or 1)
    wide = shape.hidden_size
    attention = 2 * wide * 2 * (shape.heads + shape.kv_heads) * shape.head_dim + 4 * length * shape.heads * shape.head_dim
    mlp = 2 * MLP_MATRICES * wide * expert_width(config, family) * experts
    return family.layers(config) * (attention + mlp) + (2 * wide * int(config["vocab_size"]) if logits else 0)
