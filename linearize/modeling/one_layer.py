"""One token through a whole layer of a decoder by one kernel: norms, projections, rotation, mixer and gate.

Which layers are x + o(attend(q, k, v)), their q, k and v of norm(x), and a gate behind that, is asked, not read: one like it with
other weights and an attention of our own has to give what the equations give, to the bit.
"""

from __future__ import annotations

import copy
from typing import Any

try:
    import torch
    from torch import Tensor, nn
    from torch.nn.functional import linear
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .attention import Call, LinearizedAttention, cache_layer, set_mode
from .mixer import Mixer
from .native import WIDTH
from .native_operators import Layer, layer_step, takes_few
from .one_pass import (
    GATED,
    PROBE,
    OnePass,
    OnePassGate,
    OnePassNorm,
    epsilon,
    gate_wanted,
    joined,
    norm_wanted,
    numbers,
    of_numbers,
    untouched,
    with_products,
    with_weight,
)
from .one_step import moved, reads
from .places import Places
from .products import LOG2E
from .rope import rotate
from .rows import make_rows
from .window import Scores

CHILDREN = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
NORMS = CHILDREN[::2]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
LONG = 5  # tokens of two texts: more rows than kernels take


class OnePassLayer(OnePass):
    """Mixed in before a class of decoder layers."""

    linearize_asked: Scores | bool | None = False  # what `asked` found; False before

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.linearize_plain and not args and hidden_states.shape[1] == 1:
            found = _stepped(self, hidden_states, kwargs)
            if found is not None:
                return found
        return super().forward(hidden_states, *args, **kwargs)


def layers_in_one_pass(model: Any) -> None:
    """Let the layers around a model's converted attentions take a token by one kernel where one can, in place."""
    for layer in list(model.modules()):
        attention = layer._modules.get(CHILDREN[1])
        if isinstance(attention, LinearizedAttention) and not isinstance(layer, OnePassLayer) and _made_so(layer, attention):
            layer.__class__ = joined(type(layer), OnePassLayer, named=type(layer).__name__)


def ask_layers(model: nn.Module) -> None:
    """Ask all of them, before a trace of the model, which cannot."""
    for layer in model.modules():
        if isinstance(layer, OnePassLayer):
            asked(layer)


def _made_so(layer: Any, attention: Any) -> bool:
    """Whether a layer has no other parts than this kernel knows, and their sizes are such that it takes them."""
    parts, shape = layer._modules, attention.linearize.shape
    if set(parts) != set(CHILDREN) or set(attention._modules) != {*PROJECTIONS, "linearize"}:
        return False
    if any(x is not None for module in (layer, attention) for x in (*module._parameters.values(), *module._buffers.values())):
        return False
    kinds = (
        isinstance(parts[CHILDREN[0]], OnePassNorm),
        isinstance(parts[CHILDREN[2]], OnePassNorm),
        isinstance(parts["mlp"], OnePassGate),
    )
    return all(kinds) and not any(size % WIDTH for size in (shape.hidden_size, shape.head_dim, shape.value_dim))


def _stepped(layer: Any, x: Tensor, options: dict[str, Any]) -> Tensor | None:
    """What the layer makes of one token of each row, by the kernel; None where the layer itself has to."""
    if torch.compiler.is_dynamo_compiling():
        return None
    attention: Any = layer._modules["self_attn"]
    cache, rope = options.get(attention.linearize_cache), options.get("position_embeddings")
    call: Call | None = options.get("linearize_call", attention.linearize_call)
    if cache is None or rope is None or call is None or call.segments is not None or attention.linearize_mode != "student":
        return None
    if call.mask is not None and make_rows(call.mask, None, len(x), 1, x.device) is not None:
        return None
    mixer, held = attention._modules["linearize"], cache_layer(cache, attention.linearize_index)
    if held.state is None or held.recording or held.state["count"].device != x.device or type(mixer) is not Mixer:
        return None
    undone = mixer.spec.has_far and not mixer.spec.far_rope
    if undone and attention.linearize_rope != "half":
        return None
    given, score = _read(layer, x, *rope), asked(layer)
    own = None if given is None or score is None else reads(mixer, score, held.state, x.dtype)
    if given is None or score is None or own is None:
        return None
    place = (call.places or Places()).of(mixer.spec, held.state["count"])
    after, tensors = moved(held.state, place, held.in_place)
    found = layer_step(x, given, rope, undone, place.count, tensors, own, mixer.spec.window, score.scale * LOG2E)
    held.advance(after, 1, _forgotten)
    return found


def _forgotten(tokens: int) -> Any:
    raise ValueError(f"a recurrent state cannot forget its last {tokens} tokens: nothing was recorded")


def _read(layer: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Layer | None:
    """What the kernel reads of the layer, if nobody has put anything in its place or listens to its parts.

    Asked some thirty times a token: a module's dictionaries are several times as fast as its attributes.
    """
    parts = layer._modules
    attention, gate, norms = parts["self_attn"]._modules, parts["mlp"]._modules, [parts[name] for name in NORMS]
    linears = [*(attention[name] for name in PROJECTIONS), *(gate[name] for name in GATED)]
    if not all(map(untouched, (parts["self_attn"], parts["mlp"], attention["linearize"], *norms, *linears))):
        return None
    turning, most = cos.shape[-1], attention["linearize"].shape.head_dim
    if cos.dim() != 3 or len(cos) not in (1, len(x)) or cos.shape != sin.shape or turning % (2 * WIDTH) or turning > most:
        return None
    if not all(getattr(one, "reads_few", False) for one in linears):
        return None
    held = [one._parameters if "weight" in one._parameters else one._buffers for one in linears]
    weights, scales = [own["weight"] for own in held], [own.get("scale") for own in held]
    biases = [one._parameters.get("bias") for one in linears]
    gains = [norm._parameters["weight"] for norm in norms]
    if len(weights[4]) % WIDTH or not takes_few(x, *weights, others=(cos, sin, *gains, *biases)):
        return None
    return gains, [epsilon(norm) for norm in norms], weights, scales, biases


# ---- asking ----


def asked(layer: Any) -> Scores | None:
    """How a layer's attention makes its scores, if the layer computes what this kernel does. Not asked while tracing."""
    if layer.linearize_asked is False and not torch.compiler.is_compiling():
        found = [_answer(layer, dtype) for dtype in (torch.float64, torch.bfloat16)]
        layer.linearize_asked = found[0] if all(one is not None for one in found) else None
    return layer.linearize_asked or None


def _answer(layer: Any, dtype: torch.dtype) -> Scores | None:
    shape, probe = layer.self_attn.linearize.shape, _like(layer, dtype)
    x, out = numbers(2, LONG, PROBE, dtype=dtype), numbers(2, LONG, shape.heads, shape.value_dim, dtype=dtype)
    cos, sin = (numbers(1, LONG, shape.head_dim, dtype=dtype) + more for more in (0.5, 0.25))
    seen: list[tuple[Tensor, Tensor, Tensor, Scores]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, context: Any, score: Scores) -> Tensor:
        seen.append((q, k, v, score))
        return out

    probe.self_attn.linearize_attend = attend
    options = {"attention_mask": None, "position_ids": None, probe.self_attn.linearize_cache: None, "use_cache": False}
    try:
        with torch.no_grad():
            found = probe.forward(x, **options, position_embeddings=(cos, sin), linearize_call=Call())
            wanted = _wanted(probe, x, out, cos, sin)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return None
    same = len(seen) == 1 and isinstance(found, Tensor) and all(map(torch.equal, (*seen[0][:3], found), wanted))
    return seen[0][3] if same else None


def _like(layer: Any, dtype: torch.dtype) -> Any:
    """A layer like this one, without kernels, with other weights that take `PROBE` channels."""
    shape, probe = layer.self_attn.linearize.shape, copy.copy(layer)
    probe._modules = {name: copy.copy(part) for name, part in layer._modules.items()}
    for part in (probe, *probe._modules.values()):
        part.linearize_plain = True
    for name in NORMS:
        with_weight(probe._modules[name], dtype)
    with_products(probe.mlp, dtype)
    attention = probe.self_attn
    attention._modules = dict(attention._modules)
    queries, keys, values = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.kv_heads * shape.value_dim
    sizes = ((queries, PROBE), (keys, PROBE), (values, PROBE), (PROBE, shape.heads * shape.value_dim))
    for name, (outputs, inputs) in zip(PROJECTIONS, sizes, strict=True):
        biased = layer.self_attn._modules[name].bias is not None
        attention._modules[name] = of_numbers(outputs, inputs, dtype=dtype, biased=biased)
    set_mode(attention, "student")
    return probe


def _wanted(probe: Any, x: Tensor, out: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """q, k and v of the probe's attention, and what the layer makes of what comes `out` of it."""

    def through(name: str, x: Tensor) -> Tensor:
        one: nn.Linear = probe.self_attn._modules[name]
        return linear(x, one.weight, one.bias)

    normed, head_dim, (q, k, v, o) = norm_wanted(probe.input_layernorm, x), cos.shape[-1], PROJECTIONS
    queries, keys = (through(name, normed).unflatten(-1, (-1, head_dim)).transpose(1, 2) for name in (q, k))
    values = through(v, normed).unflatten(-1, (-1, out.shape[-1])).transpose(1, 2)
    turned = (y * cos[:, None] + rotate(y, "half") * sin[:, None] for y in (queries, keys))
    middle = x + through(o, out.flatten(2))
    return *turned, values, middle + gate_wanted(probe.mlp, norm_wanted(probe.post_attention_layernorm, middle))
