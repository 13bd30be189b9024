"""Which points of the mixer space are illegal, and why: standard library only."""

from __future__ import annotations

from typing import Any

from .spec_maps import MAPS

PER_CHANNEL = ("key", "channel", "complex")
LEARNED_GATES = ("head", "channel", "complex")
FADE = 0.75  # of a learnt slot score unless it is set: of the least KL on SmolLM2 (recipes/slot_rates.py)

Rule = tuple[bool, str]


def rules(s: Any) -> list[Rule]:
    """(broken, reason) for every rule of a MixerSpec whose fields have legal values."""
    return [*_near(s), *_merge(s), *_memory(s), *_gate(s), *_far_output(s), *([] if s.causal else _bidirectional(s))]


def _near(s: Any) -> list[Rule]:
    return [
        (s.has_near and s.window < 1, f"merge '{s.merge}' needs a window of at least 1 token"),
        (
            not s.has_near and bool(s.window or s.sinks or s.slots or s.null_logits),
            "merge 'far' has no near half: set window=0, sinks=0, slots=0 and null_logits=0",
        ),
        (
            not s.has_far and s.scores_recall,
            f"slot_score '{s.slot_score}' reads the far memory, and merge 'near' has none",
        ),
        (not s.has_near and s.kv_dtype != "model", "kv_dtype is that of exact tokens, and merge 'far' has none"),
        (not s.slots and s.slot_score != "attention", "a slot_score needs slots"),
        (not s.slots and s.slot_dtype != "kv", "slot_dtype is that of tokens in slots: set slots"),
        (bool(s.more_slots) != bool(s.more_heads), "more_slots and more_heads, the kv heads that have them, go together"),
        (bool(s.more_slots) and not s.slots, "more_slots take what slots give up: set slots"),
        (len({head for head in s.more_heads if head >= 0}) < len(s.more_heads), "more_heads names each kv head once, from 0 on"),
        (s.slot_fade != FADE and not s.scores_learned, "slot_fade belongs to slot_score 'learned'"),
        (s.slot_target != "largest" and not s.scores_learned, "slot_target belongs to slot_score 'learned'"),
        (s.slot_fade < 0, "slot_fade must be at least 0"),
        (
            s.scores_recall and s.coverage != "older",
            f"slot_score '{s.slot_score}' reads a memory of older tokens: set coverage='older'",
        ),
        (
            s.scores_recall and s.state_dtype != "float32",
            f"slot_score '{s.slot_score}' chooses by what the memory holds to the last bit: set state_dtype='float32'",
        ),
        (bool(s.slots and s.max_length), "slots hand tokens on out of order: feature map 'cosformer' takes slots=0"),
    ]


def _merge(s: Any) -> list[Rule]:
    shared = s.merge == "denominator"
    return [
        (s.has_far and not s.has_near and s.coverage != "all", "without a near half far must cover all tokens"),
        (
            shared and not s.normalise and s.far_mass == "none",
            "a shared denominator needs normalise=true, or a far_mass of the memory's own",
        ),
        (shared and s.coverage != "older", "a shared denominator counts each token once: set coverage='older'"),
        (s.far_mass != "none" and not shared, "far_mass belongs to merge 'denominator'"),
        (s.learned_weights and s.merge != "sum", "learned_weights belong to merge 'sum'"),
        (s.far_weight is not None and s.merge != "sum", "far_weight belongs to merge 'sum'"),
        (not 0.0 <= s.near_weight <= 1.0, "near_weight must lie between 0 and 1"),
        (s.far_weight is not None and s.far_weight < 0, "far_weight must be at least 0"),
    ]


def _memory(s: Any) -> list[Rule]:
    return [
        (
            s.has_far and s.normalise and not MAPS[s.feature_map].positive,
            f"a denominator needs a positive feature map: '{s.feature_map}' takes normalise=false",
        ),
        (s.normalise and s.decay == "complex", "a complex decay turns weights negative: it takes normalise=false"),
        (
            s.normalise and MAPS[s.feature_map].signed and s.decay in PER_CHANNEL,
            f"features of '{s.feature_map}' are signed: with a denominator its decay must be the same for all channels",
        ),
        (s.rule != "additive" and s.normalise, f"rule '{s.rule}' has no denominator: set normalise=false"),
        (
            s.rule == "slots" and s.decay not in ("key", "channel"),
            "rule 'slots' writes what its decay forgets: decay must be key or channel",
        ),
        (
            s.rule == "slots" and MAPS[s.feature_map].positive,
            "rule 'slots' compares keys as they are: feature_map identity, l2norm or unit",
        ),
        (s.rule == "delta" and s.decay == "complex", "rule 'delta' takes a real decay"),
        (s.rule != "delta" and (s.negative or s.deltas != 1 or s.rank_one), "negative, deltas and rank_one belong to rule 'delta'"),
        (s.feature_map == "nala" and s.tied_maps, "feature map 'nala' treats queries and keys differently: tied_maps=false"),
        (s.deltas < 1, "deltas must be at least 1"),
        (s.rank_one and (s.deltas != 1 or s.negative), "rank_one takes one delta and beta below 1"),
        (bool(s.experts) and not 1 <= s.active <= s.experts, "active must lie between 1 and experts"),
        (not s.experts and bool(s.active), "active belongs to experts"),
        (
            bool(s.feature_dim) and not MAPS[s.feature_map].sized and s.rule != "slots",
            f"feature map '{s.feature_map}' has a fixed width: set feature_dim=0",
        ),
        ((s.feature_map == "cosformer") != bool(s.max_length), "feature map 'cosformer', and no other, needs max_length"),
        (not s.has_far and _far_fields(s), "merge 'near' has no far half: leave its fields at their defaults"),
    ]


def _far_fields(s: Any) -> bool:
    plain = s.decay == "none" and s.norm == "none" and s.out_gate == "none" and s.rule == "additive" and s.gate_key == "none"
    return not plain or bool(s.conv or s.experts or s.out_map or s.skip or s.scaled or not s.far_norm or not s.gate_bias)


def _gate(s: Any) -> list[Rule]:
    step = s.gate_key == "step"
    return [
        (
            s.decay == "key" and s.rule != "slots" and not MAPS[s.feature_map].by_channel,
            "decay 'key' has one value a key channel: the map must keep the head dimension",
        ),
        (
            s.rule == "slots" and s.decay == "key" and bool(s.feature_dim),
            "decay 'key' gives as many slots as key channels: feature_dim=0",
        ),
        (s.gate_divisor <= 0, "gate_divisor must be positive"),
        (
            s.gate_form != "sigmoid" and s.decay not in LEARNED_GATES,
            f"gate_form '{s.gate_form}' belongs to decay head, channel or complex",
        ),
        (bool(s.gate_rank) and s.decay not in LEARNED_GATES, "gate_rank belongs to decay head, channel or complex"),
        (s.gate_key != "none" and s.rule != "additive", "gate_key belongs to rule 'additive'"),
        (
            s.gate_key == "complement" and (s.decay not in ("key", "channel") or not MAPS[s.feature_map].by_channel),
            "gate_key 'complement' needs decay key or channel and a map that keeps the head dimension",
        ),
        (s.gate_key == "complement" and bool(s.conv), "gate_key 'complement' has no key to convolve: set conv=0"),
        (
            s.gate_key == "balance" and s.decay not in ("key", "head", "channel"),
            "gate_key 'balance' needs decay key, head or channel",
        ),
        (
            step and (s.gate_form != "softplus" or s.decay not in ("head", "channel")),
            "gate_key 'step' needs gate_form softplus and decay head or channel",
        ),
        (s.rank_one and s.decay != "channel", "rank_one needs decay 'channel'"),
    ]


def _far_output(s: Any) -> list[Rule]:
    return [
        (s.conv == 1, "a convolution of one tap does nothing: conv must be 0 or at least 2"),
        (not s.conv and (s.conv_v or s.conv_silu), "conv_v and conv_silu belong to a convolution"),
        (not s.far_norm and s.far_rope, "far_norm=false takes queries and keys from before RoPE: set far_rope=false"),
        (s.gate_first and "none" in (s.norm, s.out_gate), "gate_first orders a norm and an out_gate: it needs both"),
        (
            not s.gate_bias and s.out_gate == "none" and s.rule != "delta",
            "gate_bias=false leaves out biases of an out_gate and of rule 'delta': it needs one of them",
        ),
        (s.norm_eps <= 0, "norm_eps must be positive"),
    ]


def _bidirectional(s: Any) -> list[Rule]:
    """What supposes that tokens come one after another is no part of an encoder's layer."""
    return [
        (s.merge != "far", f"merge '{s.merge}' has a near half, and an encoder's layer is a memory of all tokens: merge 'far'"),
        (s.rule != "additive", f"rule '{s.rule}' depends on the order of the tokens, and an encoder has none: rule 'additive'"),
        (s.decay != "none", f"decay '{s.decay}' forgets earlier tokens, and to an encoder none is earlier: decay 'none'"),
        (bool(s.conv), "the convolution is causal, and an encoder is not: conv=0"),
        (bool(s.experts), "routed memories are of causal layers: experts=0"),
        (not s.normalise, "a sum over all tokens grows with the text, and an encoder has no decay against it: normalise=true"),
        (s.state_dtype != "float32", "an encoder's layer has no state to store: leave state_dtype at float32"),
    ]
