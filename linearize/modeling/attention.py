"""The swapped attention: the model's own forward does projections, norms, RoPE and o_proj; its attention function is the mixer.

The subclass takes the cache argument away from the original forward, so that no key or value is ever stored, and receives
q, k, v after RoPE through transformers' AttentionInterface. The registered function is a trampoline to the module's own
method: a checkpoint's copy of this file and an installed one can live in one process.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

try:
    import torch
    from torch import Tensor, nn
    from transformers import AttentionInterface, AttentionMaskInterface
except ImportError as error:
    raise ImportError("linearize models need torch and transformers") from error

from .memory import RecurrentLayer
from .mixer import Mixer
from .native import takes_frozen
from .native_ops import attention as native_attention
from .places import Places
from .products import LN2, LOG2E, by_onednn, exp, product
from .rope import in_one_pass
from .rows import make_rows
from .stream import Inputs
from .window import Scores

IMPLEMENTATION = "linearize"
ROW_BLOCK = 128
Observer = Callable[["LinearizedAttention", Inputs, Tensor], None]


@dataclass(frozen=True)
class Call:
    """What one model call tells all its layers: mask (B, T) of real tokens, segments (B, T) of packed documents.

    A single token's places are computed by the first layer with such a window, for all.
    """

    mask: Tensor | None = None
    segments: Tensor | None = None
    places: Places | None = None


class LinearizedAttention(nn.Module):
    """Mixed in before a transformers attention class by `swap`. Modes: student (the mixer), teacher (the original
    attention), observe (the original attention's output, with `linearize_observer` called on the mixer's inputs and it)."""

    linearize: Mixer
    linearize_mode: str
    linearize_cache: str
    linearize_index: int
    linearize_rope: str
    linearize_call: Call | None
    linearize_configs: dict[str, Any]
    linearize_observer: Observer | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = kwargs.pop("linearize_call", self.linearize_call)
        if self.linearize_mode == "teacher":
            return super().forward(*args, **kwargs)
        if self.linearize_cache and "cache" in kwargs:
            raise ValueError("this transformers calls the cache 'cache', which is not known here: pip install 'transformers<5.24'")
        cache = kwargs.pop(self.linearize_cache, None)
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        rope = kwargs.get("position_embeddings")
        if self.linearize_cache:  # an encoder has none
            kwargs[self.linearize_cache] = None
        return super().forward(*args, **kwargs, linearize_context=(cache, hidden, rope, call))

    def linearize_attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, context: tuple[Any, ...], score: Scores
    ) -> Tensor:
        """q (B, H, T, D), k and v (B, G, T, .) after RoPE; returns (B, T, H, V)."""
        cache, hidden, rope, call = context
        if call is None:
            call = Call(mask if mask is not None and mask.dim() == 2 else None)
        cos, sin = rope if rope is not None else (None, None)
        raw_q, raw_k = (None, None) if self.linearize.spec.far_norm else (unnormed(self, "q", q), unnormed(self, "k", k))
        inputs = Inputs(q, k, v, hidden, score, call.mask, call.segments, cos, sin, self.linearize_rope, raw_q, raw_k, call.places)
        if self.linearize_mode == "observe":
            target = self.linearize_softmax(inputs)
            if self.linearize_observer is not None:
                self.linearize_observer(self, inputs, target)
            return target
        layer = None if cache is None else cache_layer(cache, self.linearize_index)
        state = None if layer is None else layer.state
        out, after = self.linearize(inputs, state, keep=layer is not None, in_place=getattr(layer, "in_place", False))
        if layer is not None and after is not None:
            mixer, start = self.linearize, state

            def replay(tokens: int) -> dict[str, Tensor]:
                replayed = mixer(inputs.first(tokens), start, keep=True)[1] if tokens else start
                if replayed is None:
                    raise ValueError("a recurrent state cannot forget its first tokens: nothing was recorded before them")
                return replayed  # type: ignore[no-any-return]

            layer.advance(after, q.shape[2], replay)
        return out  # type: ignore[no-any-return]

    def linearize_softmax(self, inputs: Inputs) -> Tensor:
        """The original attention (B, T, H, V)."""
        return softmax_attention(inputs, self.linearize.spec.causal)


class RecordedNorm(nn.Module):
    """Mixed in before the class of a q or k norm by `swap`: keeps its input until the attention function takes it."""

    linearize_input: Tensor | None = None
    linearize_recording: bool = False

    def forward(self, x: Tensor) -> Any:
        self.linearize_input = x if self.linearize_recording else None
        return super().forward(x)


def norm_of(attention: Any, part: str) -> Any:
    """The attention's own norm of its queries ('q') or keys ('k'), or None."""
    return getattr(attention, f"{part}_norm", None) or getattr(attention, f"{part}_layernorm", None)


def unnormed(attention: Any, part: str, like: Tensor) -> Tensor | None:
    """The input of a recorded norm in the shape of what came out of it, `like` (B, heads, T, D); None where none is recorded."""
    norm = norm_of(attention, part)
    if not getattr(norm, "linearize_recording", False):
        return None
    x: Tensor | None = norm.linearize_input
    norm.linearize_input = None
    if x is None:
        raise ValueError(f"the {part} norm was not called: another kernel stands in its place, and the mixer reads its input")
    heads, time = like.shape[1:3]
    if x.shape == like.shape and (heads != time or x.stride(1) < x.stride(2)):  # (B, heads, T, D): a view of heads side by side
        return x
    return x.reshape(like.shape[0], time, heads, like.shape[3]).transpose(1, 2)


def attention_function(
    module: LinearizedAttention, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    context, score = kwargs["linearize_context"], scores_of(query, kwargs)
    return module.linearize_attend(query, key, value, attention_mask, context, score), None


def scores_of(query: Tensor, kwargs: dict[str, Any]) -> Scores:
    """What the attention interface's keywords say of the scores."""
    scale = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return Scores(scale, kwargs.get("softcap"), kwargs.get("s_aux"), kwargs.get("sliding_window"))


def mask_function(batch_size: int, q_length: int, *_: Any, attention_mask: Tensor | None = None, **__: Any) -> Tensor | None:
    """The padding mask of the new tokens (B, T), as it is: no T x T mask is ever built."""
    return None if attention_mask is None else attention_mask[:, -q_length:]


AttentionInterface.register(IMPLEMENTATION, attention_function)
AttentionMaskInterface.register(IMPLEMENTATION, mask_function)


def softmax_attention(inputs: Inputs, causal: bool = True) -> Tensor:
    """The original attention within each row or packed document, without a T x T tensor: (B, T, H, V).

    An encoder's (not `causal`) neither slides nor has a softcap or learned sinks.
    """
    batch, _, time, _ = inputs.q.shape
    rows = make_rows(inputs.mask, inputs.segments, batch, time, inputs.q.device)
    q, k, v = ((x if rows is None else rows.gather(x)) for x in (inputs.q, inputs.k, inputs.v))
    score = inputs.score
    if not causal:
        seen = None if rows is None else (rows.valid | (rows.lengths == 0)[:, None])[:, None, None]  # a row of pads sees zeros
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=score.scale)
        return (out if rows is None else rows.scatter(out)).transpose(1, 2)
    slides = score.sliding is not None and score.sliding < q.shape[2]
    plain = score.softcap is None and score.null is None and not slides
    kept = torch.is_grad_enabled() and q.requires_grad  # the backward pass of blocks would need all their weights
    if score.softcap is None and score.null is None and takes_frozen(q, k, v):
        out = native_attention(q, k, v, score.scale * LOG2E, score.sliding)
    elif plain and (kept or not by_onednn(q.new_empty(0, dtype=torch.promote_types(q.dtype, torch.float32)))):
        grouped = q.shape[1] != k.shape[1]
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=score.scale, enable_gqa=grouped)
    else:
        out = _blockwise_attention(q, k, v, score)
    return (out if rows is None else rows.scatter(out)).transpose(1, 2)


def _blockwise_attention(q: Tensor, k: Tensor, v: Tensor, score: Scores) -> Tensor:
    """Causal attention (B, H, T, V) in blocks of queries; twice as fast as PyTorch's own where oneDNN makes its products."""
    wide, time = torch.promote_types(q.dtype, torch.float32), q.shape[2]
    k, v, outputs = k.to(wide), v.to(wide), []
    for start in range(0, time, ROW_BLOCK):
        stop = min(start + ROW_BLOCK, time)
        first = 0 if score.sliding is None else max(start + 1 - score.sliding, 0)
        distance = torch.arange(start, stop, device=q.device)[:, None] - torch.arange(first, stop, device=q.device)
        visible = distance >= 0
        if score.sliding is not None:
            visible &= distance < score.sliding
        else:
            visible = visible[:, start:]
        weights, top = relative_weights(q[:, :, start:stop].to(wide), k[:, :, first:stop], score, visible.to(wide))
        sums = weights.sum(-1, keepdim=True)
        if score.null is not None:
            sums = sums + exp(score.null.to(wide)[:, None, None] - top)
        outputs.append((grouped_product(weights, v[:, :, first:stop]) / sums).to(q.dtype))
    return torch.cat(outputs, dim=2)


def relative_weights(q: Tensor, k: Tensor, score: Scores, visible: Tensor) -> tuple[Tensor, Tensor]:
    """e^(s - top) (B, H, n, S) of queries (B, H, n, D) on keys (B, G, S, D), and the largest score `top` (B, H, n, 1) of each.

    `visible` (..., n, l) is 1 where a query sees one of the last l keys, else 0; earlier keys are seen by all.
    """
    folded = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    weights = score(folded, k, LOG2E).view(*q.shape[:3], k.shape[2])  # of base 2
    bound = torch.where(visible > 0, 0.0, -torch.inf)
    weights[..., weights.shape[-1] - visible.shape[-1] :].add_(bound)
    top = weights.detach().amax(-1, keepdim=True)
    return weights.sub_(top).exp2_(), top * LN2


def grouped_product(weights: Tensor, v: Tensor) -> Tensor:
    """Weights (B, H, n, S) times values (B, G, S, V) of the heads' groups: (B, H, n, V)."""
    out: Tensor = product(weights.unflatten(1, (v.shape[1], -1)).flatten(2, 3), v)
    return out.view(*weights.shape[:3], v.shape[-1])


def cache_layer(cache: Any, index: int) -> Any:
    """This layer's place in a transformers cache; a stock layer that stands there unused is replaced by ours."""
    return upgrade_cache(cache, [index])[0]


def upgrade_cache(cache: Any, indices: list[int]) -> list[Any]:
    """Constant-size layers of a transformers cache at the converted indices, put there. ValueError if a stock one holds tokens."""
    blank = getattr(cache, "layer_class_to_replicate", None)
    while len(cache.layers) <= max(indices):
        cache.layers.append(blank() if blank is not None else RecurrentLayer())
    for index in indices:
        layer = cache.layers[index]
        if getattr(layer, "is_linearize_layer", False):
            continue
        if layer.get_seq_length() > 0:
            raise ValueError(f"cache layer {index} holds softmax keys and values: start a new cache for this model")
        cache.layers[index] = RecurrentLayer()
    return [cache.layers[index] for index in indices]


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def linearized_class_of(base: type[nn.Module], mixin: type[nn.Module]) -> type[nn.Module]:
    """The one subclass for a class of attention or norm, findable by name in this module so that it pickles."""
    if base not in _CLASSES:
        own = in_one_pass(base) if mixin is LinearizedAttention else base
        made = type(f"Linearized{base.__name__}", (mixin, own), {"__module__": __name__})
        _CLASSES[base] = globals()[made.__name__] = made
    return _CLASSES[base]


def swap(attention: Any, mixer: Mixer, cache: str, index: int, rope: str = "half", sdpa: bool = True) -> None:
    """Turn one attention module, in place, into its linearized subclass; parameter names stay as they were.

    `cache` is the keyword of its cache ("" none), `rope` a style of `unrotate`; without `sdpa` its own softmax is computed eagerly.
    """
    config = copy.copy(attention.config)
    config._attn_implementation_internal = IMPLEMENTATION
    original = copy.copy(attention.config)
    if original._attn_implementation_internal in (None, IMPLEMENTATION):
        original._attn_implementation_internal = "sdpa" if sdpa else "eager"
    attention.__class__ = linearized_class_of(type(attention), LinearizedAttention)
    for norm in () if mixer.spec.far_norm else filter(None, (norm_of(attention, part) for part in "qk")):
        norm.__class__ = linearized_class_of(type(norm), RecordedNorm)
    attention.linearize = mixer
    attention.linearize_configs = {"student": config, "observe": config, "teacher": original}
    attention.linearize_cache, attention.linearize_index, attention.linearize_rope = cache, index, rope
    attention.linearize_observer, attention.linearize_call = None, None
    set_mode(attention, "student")


def set_mode(attention: Any, mode: str) -> None:
    attention.linearize_mode = mode
    for norm in (norm_of(attention, part) for part in "qk"):
        if isinstance(norm, RecordedNorm):
            norm.linearize_recording = mode != "teacher"
    attention.config = attention.linearize_configs[mode]
