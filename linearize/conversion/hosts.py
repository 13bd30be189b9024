"""What a model class of another library must say to be exported to, and the parts of mixers as all of them want them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linearize.modeling.mixer import Mixer
from linearize.modeling.spec import MixerSpec, Shape

Reason = tuple[bool, str]
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Host:
    """A model class that has the layer of a mixer. Configs are those of the converted model, by name."""

    model_type: str
    package: str  # and the version that first computes what is written
    version: tuple[int, int]
    teachers: tuple[str, ...]
    method: str
    reasons: Callable[[MixerSpec, Shape, Mapping[str, Any]], list[Reason]]  # against a converted layer
    config: Callable[[MixerSpec, Shape, Mapping[str, Any], list[int]], dict[str, Any]]  # and the kept layers
    layer: Callable[[Any], Weights]  # of a converted attention, by its names below the decoder layer
    rest: Callable[[Weights], Weights]  # of all else, by its names in the model
    module: str = ""  # import this to make transformers know the class
    keeps: bool = True  # softmax layers beside its own
    kernels: bool = False  # it runs on a GPU alone

    @property
    def requires(self) -> str:
        return f"{self.package}>={'.'.join(map(str, self.version))}"


def shared_reasons(s: MixerSpec, host: str) -> list[Reason]:
    """(broken, reason) for what no such layer does."""
    decay = f"{s.decay}, {s.gate_form}" if s.decay != "none" else "none"
    return [
        (s.has_near, "its mixers keep an exact softmax window, and no recurrent layer there has one"),
        (bool(s.experts), "its memories are routed"),
        (s.normalise, f"its memory is read through a denominator under feature map '{s.feature_map}', and {host} has neither"),
        (
            s.decay != "head" or s.gate_form != "softplus",
            f"its decay is '{decay}', and {host} decays a head at a time by e^A softplus(x)",
        ),
        (s.gate_bias, f"its gates have biases, and those of {host} have none"),
        (s.far_norm, f"its memory reads queries and keys after the model's own norms, {host} as they are projected"),
        (s.far_rope, f"its memory keeps RoPE, and {host} has none"),
        (not (s.conv and s.conv_v and s.conv_silu), f"{host} convolves queries, keys and values, each with SiLU after it"),
        (s.norm != "rms" or s.out_gate != "silu", f"{host} has an RMS norm and a SiLU gate on the memory's output"),
        (s.scaled, f"its queries are scaled before the feature map, in {host} after it"),
        (s.state_dtype != "float32", f"its memory is stored in {s.state_dtype}, in {host} in float32"),
    ]


def model_reasons(config: Mapping[str, Any], host: str, kept: list[int], sliding: list[int | None]) -> list[Reason]:
    """(broken, reason) for what the model around the mixers has and the host has not; `sliding` is each layer's window."""
    slides = [i for i in kept if sliding[i] is not None]
    biased = next((name for name in ("attention_bias", "mlp_bias") if config.get(name)), "")
    return [
        (bool(biased), f"the model has {biased}, and {host} has no such bias"),
        (config.get("hidden_act") != "silu", f"the model's activation is '{config.get('hidden_act')}', that of {host} silu"),
        (bool(slides), f"layer {next(iter(slides), 0)} keeps a sliding window of softmax, and {host} has none"),
    ]


def delta_reasons(s: MixerSpec, shape: Shape, config: Mapping[str, Any], host: str) -> list[Reason]:
    """(broken, reason) for Gated DeltaNet; its queries are divided by sqrt(D), which the norm undoes but for its epsilon."""
    return [
        *shared_reasons(s, host),
        (s.rank_one or s.deltas != 1, f"{host} makes one delta update a token, along its key"),
        (s.feature_map != "unit", f"its feature map is '{s.feature_map}', that of {host} x / sqrt(|x|^2 + 1e-6)"),
        (s.gate_first or s.skip, f"{host} gates after its norm and has no skip"),
        same_epsilon(s, config.get("rms_norm_eps", 1e-6) * shape.head_dim, host),
    ]


def same_epsilon(s: MixerSpec, expected: float, host: str) -> Reason:
    broken = not math.isclose(s.norm_eps, expected, rel_tol=1e-6)
    return broken, f"the epsilon of its output norm is {s.norm_eps:g}, in {host} it would be {expected:g}"


# ---- parts: one of each for every query head ----


def by_head(attention: Any) -> Iterator[Tensor]:
    """Rows (H, D, C) of the projections of q, k and v."""
    shape = attention.linearize.shape
    for name, dim in (("q_proj", shape.head_dim), ("k_proj", shape.head_dim), ("v_proj", shape.value_dim)):
        own = getattr(attention, name).weight.unflatten(0, (-1, dim))
        yield own.repeat_interleave(shape.heads // len(own), dim=0)


def taps_by_head(conv: Any, mixer: Mixer) -> Tensor:
    """Taps (H, D, n), the last for the token itself, as torch's convolutions have them."""
    taps: Tensor = conv.weight.permute(1, 2, 0)
    return taps.repeat_interleave(mixer.shape.heads // len(taps), dim=0)


def memory_by_head(x: Tensor, mixer: Mixer) -> Tensor:
    """(M, ...) to (H, ...): a memory that several heads read becomes one for each."""
    return x.repeat_interleave(mixer.shape.heads // len(x), dim=0)


def decay_by_head(mixer: Mixer) -> Weights:
    """A and the bias b of log alpha = -e^A softplus(w x + b), each (H,), under the names that all hosts give them."""
    gate: Any = mixer.gate
    return {"A_log": memory_by_head(gate.a_log, mixer), "dt_bias": memory_by_head(gate.bias, mixer)}


def dense(projection: Any) -> Tensor:
    """W (rows, C) of a projection, of low rank or not."""
    weight: Tensor = projection.up if projection.down is None else projection.up @ projection.down
    return weight


def projection_by_head(projection: Any, mixer: Mixer) -> Tensor:
    return memory_by_head(dense(projection), mixer)


def output(attention: Any, weighted: bool) -> Tensor:
    """The output projection (C, H V) with each head's map, and its norm's weight where it is `weighted`, multiplied in."""
    mixer: Mixer = attention.linearize
    own: Tensor = attention.o_proj.weight
    heads = own.to(torch.promote_types(own.dtype, torch.float32)).unflatten(1, (mixer.shape.heads, -1))  # (C, H, V)
    if mixer.output.map is not None:
        heads = torch.einsum("chv,hwv->chw", heads, mixer.output.map)
    if weighted and mixer.output.weight is not None:
        heads = heads * mixer.output.weight
    flat: Tensor = heads.flatten(1)
    return flat
