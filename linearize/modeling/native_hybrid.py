"""Both halves of a mixer like the default by kernels: at once without gradients, and with them as one function."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from copy import copy
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import Any

try:
    import torch
    from torch import Tensor
    from torch.autograd.function import once_differentiable
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .far_mass import log_mass
from .native import WIDTH, library, pointer, rows
from .native_ops import AdditiveFunction, HedgehogFunction, MergeFunction, WindowFunction
from .products import LN2
from .spec import MixerSpec, Shape


@cache
def fuses(spec: MixerSpec, shape: Shape) -> bool:
    """Whether these compute this mixer: the default but for its sizes, and what it keeps in which precision."""
    return like_default(spec) and (spec.feature_dim or shape.head_dim) % WIDTH == 0


def like_default(spec: MixerSpec) -> bool:
    free = ("window", "sinks", "feature_dim", "far_mass", "far_rope", "far_norm", "kv_dtype", "state_dtype")
    own = {name: getattr(spec, name) for name in free}
    return spec == MixerSpec(feature_map="hedgehog", share_kv=True, merge="denominator", coverage="older", **own)


@cache
def steps(spec: MixerSpec) -> bool:
    """Whether one kernel takes a token through this mixer: a window alone or the default, with slots between that go by attention,
    and that hold the keys which the memory takes."""
    free = ("slots", "more_slots", "more_heads", "slot_score", "slot_target", "slot_fade", "slot_dtype")
    fields = MixerSpec()
    plain = replace(spec, **{name: getattr(fields, name) for name in free})
    if spec.slots and (not spec.far_rope or spec.slot_score not in ("attention", "learned")):
        return False
    alone = replace(plain.near_only(), state_dtype=spec.state_dtype)
    return bool(spec.window) and spec.window_kind == "sliding" and (plain == alone or like_default(plain))


# ---- without gradients ----


class _Call(ctypes.Structure):
    """The same fields as hybrid.cpp's."""

    POINTERS = ("q", "far_q", "k", "v", "far_k", "sink_k", "sink_v", "count", "weight_q", "weight_k", "slope", "bias", "slant",
                "state", "out")  # fmt: skip
    SIZES = ("q_batch", "q_head", "q_token", "far_batch", "far_head", "far_token", "batch", "groups", "repeats", "time", "lead",
             "dim", "width", "sinks", "window", "columns")  # fmt: skip
    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS), *((name, ctypes.c_int64) for name in SIZES), ("scale", ctypes.c_float)
    )  # fmt: skip


def hybrid(
    tensors: dict[str, Tensor], terms: tuple[Tensor | None, ...], state: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Sinks, sliding window and memory of Hedgehog features as one softmax, without gradients: (B, T, H, V), and the next state.

    `tensors` by hybrid.cpp's names, and of the far mass `terms` slope, bias and slant; state (B, G, K, V + 1); `scale` of scores
    of base 2.
    """
    given = {name: rows(x) if name in ("q", "far_q") else x.contiguous() for name, x in tensors.items()}
    q, k, width = given["q"], given["k"], given["v"].shape[-1]
    (batch, heads, time, dim), groups = q.shape, k.shape[1]
    state, out = state.clone(memory_format=torch.contiguous_format), q.new_empty(batch, time, heads, width)
    given |= {"state": state, "out": out}
    kept = dict(zip(("slope", "bias", "slant"), (x if x is None else x.contiguous() for x in terms), strict=True))
    sizes = (*q.stride()[:3], *given["far_q"].stride()[:3], batch, groups, heads // groups, time, k.shape[2] - time, dim, width,
             given["sink_k"].shape[2], window, given["weight_q"].shape[-1])  # fmt: skip
    found: Any = library()
    found.hybrid_forward(ctypes.byref(_Call(*(pointer({**given, **kept}[name]) for name in _Call.POINTERS), *sizes, scale)))
    return out, state


# ---- with gradients ----


def hybrid_trained(
    stream: tuple[Tensor, ...], maps: tuple[Tensor, ...], terms: tuple[Tensor | None, ...], sizes: tuple[int, int], scale: float
) -> Tensor:
    """The same of whole texts, longer than sinks and window: (B, H, T, V), with gradients.

    `stream` q, k, v, far_q, far_k; `maps` weights of queries' and keys' features; of the far mass `terms` slope, bias, slant of
    base e; `sizes` sinks and window; `scale` of scores of base 2.
    """
    found: Tensor = _Hybrid.apply(*stream, *maps, *terms, sizes, scale)  # type: ignore[no-untyped-call]
    return found.transpose(1, 2)


class _Tape:
    """What one kernel's forward pass leaves for its backward pass, within another function's."""

    def __init__(self, *needs: bool) -> None:
        self.needs_input_grad = needs
        self.saved_tensors: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *_: Tensor) -> None:
        """The other function says so of its own."""

    def holding(self, tensors: Iterable[Tensor]) -> _Tape:
        """This one with what it saved. It is given back by who saved it for both: kept here it would keep its graph alive."""
        found = copy(self)
        found.saved_tensors = tuple(tensors)
        return found


class _Hybrid(torch.autograd.Function):
    """A query sees what has left its window from the first that is `begin` tokens into the text."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, far_q: Tensor, far_k: Tensor, weight_q: Tensor, weight_k: Tensor,
        slope: Tensor | None, bias: Tensor | None, slant: Tensor | None, sizes: tuple[int, int], scale: float,
    ) -> Tensor:  # fmt: skip
        sinks, window = sizes
        needs, groups, begin, end = ctx.needs_input_grad, k.shape[1], sinks + window, q.shape[2] - window
        near, of_q, of_k = _Tape(), _Tape(needs[3], True), _Tape(needs[4], True)
        memory, whole = _Tape(True, True, needs[2], False), _Tape(any(needs[:3]), any(needs[:3]))
        tapes = near, of_q, of_k, memory, whole
        count, sink_k, sink_v = torch.zeros(len(q), dtype=torch.long), k[:, :, :sinks], v[:, :, :sinks]
        given = (q.unflatten(1, (groups, -1)), k, v, sink_k, sink_v, count, 0, (*sizes, False), scale, None)
        numerator, denominator, top, _ = WindowFunction.forward(near, *given)
        part = numerator.flatten(1, 2), denominator.flatten(1, 2), top.flatten(1, 2) * LN2
        phi_q = HedgehogFunction.forward(of_q, far_q[:, :, begin:], weight_q).unflatten(1, (groups, -1))
        phi_k = HedgehogFunction.forward(of_k, far_k[:, :, sinks:end], weight_k)
        values = torch.nn.functional.pad(v[:, :, sinks:end], (0, 1), value=1.0)
        nothing = q.new_zeros(len(q), groups, phi_k.shape[-1], values.shape[-1])
        read, _ = AdditiveFunction.forward(memory, phi_q, phi_k, values, nothing, 0)
        factor = log_mass(far_q[:, :, begin:], part[2][:, :, begin:], slope, bias, slant)
        out = MergeFunction.forward(whole, *part, read.flatten(1, 2), factor)
        ctx.save_for_backward(far_q, slope, *(x for tape in tapes for x in tape.saved_tensors))
        ctx.sizes, ctx.counts = sizes, [len(tape.saved_tensors) for tape in tapes]
        ctx.tapes = [tape.holding(()) for tape in tapes]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        far_q, slope, *kept = ctx.saved_tensors
        saved = iter(kept)
        pairs = zip(ctx.tapes, ctx.counts, strict=True)
        near, of_q, of_k, memory, whole = (tape.holding(islice(saved, count)) for tape, count in pairs)
        top, begin, end = whole.saved_tensors[2], sum(ctx.sizes), far_q.shape[2] - ctx.sizes[1]
        of_numerator, of_denominator, _, of_read, of_factor = MergeFunction.backward(whole, grad)
        phi_q, phi_k, values, _ = memory.saved_tensors
        nothing = of_read.new_zeros(*phi_k.shape[:2], phi_k.shape[-1], values.shape[-1])
        of_phi_q, of_phi_k, of_values, *_ = AdditiveFunction.backward(memory, of_read.unflatten(1, phi_q.shape[1:3]), nothing)
        far, of_weight_q = HedgehogFunction.backward(of_q, of_phi_q.flatten(1, 2))
        back, of_weight_k = HedgehogFunction.backward(of_k, of_phi_k)
        of_terms = _of_terms(of_factor, far_q[:, :, begin:], top[:, :, begin:], ctx.needs_input_grad[7:10])
        if far is not None and slope is not None:
            far.addcmul_(of_factor[..., None], slope[:, None])
        rest = (of_weight_q, of_weight_k, *of_terms, None, None)
        far = None if far is None else torch.nn.functional.pad(far, (0, 0, begin, 0))
        back = None if back is None else torch.nn.functional.pad(back, (0, 0, ctx.sizes[0], ctx.sizes[1]))
        if of_numerator is None:
            return None, None, None, far, back, *rest
        grads = (of_numerator, of_denominator)
        q, k, v, sink_k, sink_v, *_ = WindowFunction.backward(near, *(x.unflatten(1, phi_q.shape[1:3]) for x in grads))
        k[:, :, : ctx.sizes[0]] += sink_k
        v[:, :, : ctx.sizes[0]] += sink_v
        if of_values is not None:
            v[:, :, ctx.sizes[0] : end] += of_values[..., :-1]
        return q.flatten(1, 2), k, v, far, back, *rest


def _of_terms(grad: Tensor, q: Tensor, top: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Of log mass = slope . q + bias + slant top, gradients of slope (H, D), bias and slant (H) by that of it (B, H, n)."""
    slope = (grad[:, :, None] @ q).sum(0)[:, 0] if needs[0] else None
    return slope, grad.sum((0, 2)) if needs[1] else None, (grad * top).sum((0, 2)) if needs[2] else None
