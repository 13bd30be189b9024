"""What the kernels for CPUs compute: each is what its PyTorch form computes, and is held to it by tests."""

from __future__ import annotations

from typing import Any

try:
    import torch
    from torch import Tensor
    from torch.autograd.function import once_differentiable
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .native import call, rows, up
from .products import LN2
from .recurrence_additive import CHUNK

TAPS = 8  # of a convolution, at most; convolution.cpp
UNITS = 16  # of work at least, whatever the number of threads
SHARES = 4  # in which the gradient of a map is summed, whatever the number of threads

# ---- sinks and window ----


def window(
    q: Tensor, k: Tensor, v: Tensor, sink_k: Tensor, sink_v: Tensor, count: Tensor, lead: int, sizes: tuple[int, int, bool],
    scale: float, until: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """`near_chunked`: numerator, denominator and maximum of base 2; of queries before `until` what keys received.

    `sizes` are sinks, window, terraced. The first two have gradients.
    """
    sink_k, sink_v = (x[:, :, : sizes[0]] for x in (sink_k, sink_v))  # where there are none, any keys may stand there
    count = count.expand(len(q)).contiguous()
    until = None if until is None else until.expand(len(q)).contiguous()
    arguments = (q, k, v, sink_k, sink_v, count, lead, sizes, scale, until)
    found: tuple[Tensor, Tensor, Tensor, Tensor | None] = WindowFunction.apply(*arguments)  # type: ignore[no-untyped-call]
    return found


class WindowFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink_k: Tensor, sink_v: Tensor, count: Tensor, lead: int,
        sizes: tuple[int, int, bool], scale: float, until: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
        (batch, groups, repeats, time, dim), width, (sinks, size, terraced) = q.shape, v.shape[-1], sizes
        numerator, denominator, top = q.new_empty(*q.shape[:-1], width), q.new_empty(q.shape[:-1]), q.new_empty(q.shape[:-1])
        received = None if until is None else q.new_zeros(k.shape[:3])
        q = rows(q).flatten(1, 2)
        k, v, sink_k, sink_v = (x.contiguous() for x in (k, v, sink_k, sink_v))
        given: tuple[Tensor | int, ...] = (q, *q.stride()[:3], k, v, sink_k, sink_v, count)
        ctx.sizes = (batch, groups, repeats, time, lead, dim, width, sinks, size, int(terraced), scale)
        call("window_attend", *given, until, received, numerator, denominator, top, *ctx.sizes)
        ctx.save_for_backward(q, k, v, sink_k, sink_v, count, top)
        ctx.mark_non_differentiable(*(x for x in (top, received) if x is not None))
        return numerator, denominator, top, received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, mass: Tensor, *_: Tensor) -> tuple[Any, ...]:
        q, k, v, sink_k, sink_v, count, top = ctx.saved_tensors
        of_q, of_k, of_v, of_sink_k, of_sink_v = (x.new_empty(x.shape) for x in (q, k, v, sink_k, sink_v))
        given = (q, *q.stride()[:3], k, v, sink_k, sink_v, count, top, grad.contiguous(), mass.contiguous())
        call("window_backward", *given, of_q, of_k, of_v, of_sink_k, of_sink_v, *ctx.sizes)
        return of_q.unflatten(1, ctx.sizes[1:3]), of_k, of_v, of_sink_k, of_sink_v, None, None, None, None, None


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, sliding: int | None) -> Tensor:
    """Causal softmax attention (B, H, T, V) of q (B, H, T, D) on k and v (B, G, T, .): a window as long as the text."""
    count, none = torch.zeros(1, dtype=torch.long), k[:, :, :0]
    sizes = (0, min(sliding or q.shape[2], q.shape[2]), False)
    numerator, denominator, *_ = window(q.unflatten(1, (k.shape[1], -1)), k, v, none, none, count, 0, sizes, scale)
    return numerator.div_(denominator[..., None]).flatten(1, 2)


# ---- the additive engine ----


def additive(q: Tensor, k: Tensor, v: Tensor, state: Tensor, terraced: int) -> tuple[Tensor, Tensor]:
    """`recurrence_additive.chunked` without decay, for K a multiple of WIDTH."""
    found: tuple[Tensor, Tensor] = AdditiveFunction.apply(q, k, v, state, terraced)  # type: ignore[no-untyped-call]
    return found


class AdditiveFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, state: Tensor, terraced: int) -> tuple[Tensor, Tensor]:
        q, k, v = (x.contiguous() for x in (q, k, v))
        width, sizes = v.shape[-1], _sizes(q, v, terraced)
        states = q.new_empty(len(state), state.shape[1], -(-q.shape[3] // (terraced or CHUNK)) + 1, q.shape[-1], up(width))
        states[:, :, 0] = torch.nn.functional.pad(state, (0, up(width) - width))
        out = q.new_empty(*q.shape[:-1], up(width))
        call("additive_forward", q, k, v, states, out, *sizes)
        ctx.save_for_backward(q, k, v, states)
        ctx.terraced = terraced
        return out[..., :width], states[:, :, -1, :, :width].clone()  # a view would keep the states of all chunks alive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, last: Tensor) -> tuple[Any, ...]:
        q, k, v, states = ctx.saved_tensors
        width = v.shape[-1]
        borders, of_q = torch.empty_like(states), torch.empty_like(q)
        borders[:, :, -1] = torch.nn.functional.pad(last, (0, up(width) - width))
        of_k = torch.empty_like(k) if ctx.needs_input_grad[1] else None
        of_v = q.new_empty(*v.shape[:-1], up(width)) if ctx.needs_input_grad[2] else None
        sizes = _sizes(q, v, ctx.terraced)
        call("additive_backward", q, k, v, states, grad.contiguous(), borders, of_q, of_k, of_v, *sizes)
        first = borders[:, :, 0, :, :width] if ctx.needs_input_grad[3] else None
        return of_q, of_k, None if of_v is None else of_v[..., :width], first, None


def _sizes(q: Tensor, v: Tensor, terraced: int) -> tuple[int, ...]:
    batch, memories, readers, time, keys = q.shape
    return batch * memories, readers, time, keys, v.shape[-1], terraced or CHUNK, int(terraced > 0)


# ---- the Hedgehog map ----


def hedgehog(x: Tensor, weight: Tensor) -> Tensor:
    """[softmax(Wx), softmax(-Wx)] of x (B, H, T, D) and W (H, D, F), F a multiple of WIDTH."""
    found: Tensor = HedgehogFunction.apply(x, weight)  # type: ignore[no-untyped-call]
    return found


class HedgehogFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x, weight = rows(x), weight.contiguous()
        phi = x.new_empty(*x.shape[:-1], 2 * weight.shape[-1])
        call("hedgehog_forward", x, weight, phi, *x.shape, weight.shape[-1], *x.stride()[:3])
        ctx.save_for_backward(x, weight, phi)
        return phi

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, phi = ctx.saved_tensors
        shares = weight.new_empty(len(weight), SHARES, *weight.shape[1:])
        of_x = x.new_empty(x.shape) if ctx.needs_input_grad[0] else None
        sizes = (SHARES, *x.shape, weight.shape[-1], *x.stride()[:3])
        call("hedgehog_backward", x, weight, phi, grad.contiguous(), shares, of_x, *sizes)
        return of_x, shares.sum(1)


def cross_entropy(
    phi_q: Tensor, phi_k: Tensor, q: Tensor, k: Tensor, scale: float, first: Tensor, own: slice, factor: float, wanted: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """-sum_ti A_ti log (s_ti / sum_j s_tj) over the queries `own`, times `factor`, and gradients by phi_q and phi_k where `wanted`.

    A softmax of q (B, H, T, D) on k (B, G, T, D), s of phi_q (B, M, R, T, K) on phi_k (B, M, T, K); each query sees the keys from
    `first` (B, T), which does not fall, to its own; `scale` is that of scores of base 2. K is a multiple of WIDTH.
    """
    phi_q, phi_k, q, k = phi_q.contiguous(), phi_k.contiguous(), rows(q), rows(k)
    batch, memories, readers, time, keys = phi_q.shape
    shares = -(-UNITS // (batch * memories))
    losses = torch.empty(batch, memories, shares, dtype=torch.float64)
    of_q = (torch.zeros_like if own.stop - own.start < time else torch.empty_like)(phi_q) if wanted else None
    of_k = phi_k.new_empty(shares, *phi_k.shape) if wanted else None
    sizes = (batch, memories, readers, k.shape[1], time, keys, q.shape[-1], own.start, own.stop, shares)
    given: tuple[Tensor | int, ...] = (phi_q, phi_k, q, *q.stride()[:3], k, *k.stride()[:3], first.contiguous())
    call("weights_loss", *given, losses, of_q, of_k, *sizes, scale, factor)
    loss = losses.sum().to(q.dtype)
    if of_k is None:
        return loss, None, None
    for share in of_k[1:]:
        of_k[0].add_(share)  # in place: a sum over a dimension fills its memory first
    return loss, of_q, of_k[0]


def received(
    q: Tensor, k: Tensor, first: Tensor, sinks: int, apart: int, scale: float, squares: bool = False
) -> tuple[Tensor, Tensor]:
    """Of a causal softmax of q (B, H, T, D) on k (B, G, T, D), the most that a key gets, in logarithms, each (B, G, T):

    of what a query's window, whose `first` (T) key it is from on, and sinks share out, from those more than `apart` tokens away;
    and of all, from those whose window it has left. -inf where there is none. Of the latter the sum of `squares` instead, as it is.
    `scale` is that of scores of base 2.
    """
    q, k = rows(q), rows(k)
    (batch, groups, time, dim), repeats = k.shape, q.shape[1] // k.shape[1]
    inside, beyond = q.new_empty(batch, groups, time), q.new_empty(batch, groups, time)
    given: tuple[Tensor | int, ...] = (q, *q.stride()[:3], k, *k.stride()[:3], first.contiguous(), inside, beyond)
    call("attention_received", *given, batch, groups, repeats, time, dim, sinks, apart, int(squares), scale)
    return inside.mul_(LN2), beyond if squares else beyond.mul_(LN2)


# ---- rotary position embeddings ----


def rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """y = x cos + rotate(x) sin of the first W channels of x (B, H, T, D), which are paired as halves, or where `inverse` x of y.

    cos, sin (B or 1, T, W), without gradients, W a multiple of 2 WIDTH.
    """
    found: Tensor = _Rope.apply(x, cos.contiguous(), sin.contiguous(), 2 * inverse)  # type: ignore[no-untyped-call]
    return found


class _Rope(torch.autograd.Function):
    """`kind` is rope.cpp's: 2 undoes, 1 transposes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, kind: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.kind = kind
        return _turned(x, cos, sin, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, ctx.kind + 1), None, None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, kind: int) -> Tensor:
    x, y = rows(x), x.new_empty(x.shape)
    call("rope", x, cos, sin, y, *x.stride()[:3], *x.shape, cos.shape[-1], 0 if len(cos) == 1 else cos.stride(0), kind)
    return y


# ---- a sigmoid gate ----


def log_sigmoid(y: Tensor, bias: Tensor | None, heads: int, divisor: float) -> Tensor:
    """log sigmoid(y + bias) / divisor (B, H, T, F) of y (B, T, H F) and a bias (H F), F a multiple of WIDTH."""
    found: Tensor = _LogSigmoid.apply(y, bias, heads, divisor)  # type: ignore[no-untyped-call]
    return found


class _LogSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor | None, heads: int, divisor: float) -> Tensor:
        y, (batch, time, width) = y.contiguous(), y.shape
        out = y.new_empty(batch, heads, time, width // heads)
        call("gate_forward", y, bias, out, *out.shape, width, float(divisor))
        ctx.save_for_backward(y, bias)
        ctx.divisor = float(divisor)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, bias = ctx.saved_tensors
        of_y, shares = torch.empty_like(y), y.new_empty(UNITS, y.shape[-1])
        call("gate_backward", y, bias, grad.contiguous(), of_y, shares, len(shares), *grad.shape, y.shape[-1], ctx.divisor)
        return of_y, None if bias is None else shares.sum(0), None, None


# ---- a convolution over time ----


def convolution(x: Tensor, weight: Tensor) -> Tensor:
    """y_t = sum_i w_i x_{t+i} (B, H, T, D) of x (B, H, T + n - 1, D) and w (n, H, D), for n <= TAPS and D a multiple of WIDTH."""
    found: Tensor = _Convolution.apply(x, weight)  # type: ignore[no-untyped-call]
    return found


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        (batch, heads, length, dim), taps = x.shape, len(weight)
        y = x.new_empty(batch, heads, length - taps + 1, dim)
        call("convolution_forward", x, weight, y, batch * heads, *y.shape[1:], taps)
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        of_x, of_weight = torch.empty_like(x) if ctx.needs_input_grad[0] else None, torch.empty_like(weight)
        sizes = (len(x) * x.shape[1], *grad.shape[1:], len(weight))
        call("convolution_backward", x, weight, grad.contiguous(), of_weight, of_x, *sizes)
        return of_x, of_weight


# ---- one softmax ----


def merge(numerator: Tensor, denominator: Tensor, top: Tensor, read: Tensor, factor: Tensor) -> Tensor:
    """The output (B, H, T, V) of a near half and a read (B, H, n, V + 1) of the last n queries with the mass in its last column.

    `factor` (B, H, n) is the log of what the memory weighs, as Merge has it. The maximum `top` has no gradient.
    """
    found: Tensor = MergeFunction.apply(numerator, denominator, top, read, factor)  # type: ignore[no-untyped-call]
    return found.transpose(1, 2)


class MergeFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, numerator: Tensor, denominator: Tensor, top: Tensor, read: Tensor, factor: Tensor) -> Tensor:
        given = (*(x.contiguous() for x in (numerator, denominator, top)), rows(read), factor.contiguous())
        batch, heads, time, width = numerator.shape
        out = numerator.new_empty(batch, time, heads, width)
        call("merge_forward", *given, out, *numerator.shape, time - read.shape[2], *given[3].stride()[:3])
        ctx.save_for_backward(*given, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        *given, out = ctx.saved_tensors
        numerator, denominator, _, read, factor = given
        of_read, of_factor = read.new_empty(read.shape), torch.empty_like(factor)
        near = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        of_near = (torch.empty_like(numerator), torch.empty_like(denominator)) if near else (None, None)
        sizes = (*numerator.shape, numerator.shape[2] - read.shape[2], *read.stride()[:3])
        call("merge_backward", *given, out, grad.contiguous(), *of_near, of_read, of_factor, *sizes)
        return *of_near, None, of_read, of_factor
