"""Who computes an engine: a kernel of flash-linear-attention on a GPU, on a CPU one of our own (native.py), else PyTorch.

Each call chooses by the device of its tensors, not by what can be imported. LINEARIZE_BACKEND=auto, the default, is that choice;
`torch` takes no kernel; `fla` takes fla's on any device: on a CPU they run under Triton's interpreter only (TRITON_INTERPRET=1).
Those exist for the additive engine and for tied deltas, one a token, with one decay a head or none. They take float32 and
tokens that enter one by one; whatever they do not take, PyTorch does. They take differences of cumulative log-decays and, on GPUs
that have it, multiply in TF32, so they are less exact. Functions here have the signatures of the engines' own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .native import WIDTH, asked, takes
from .native_decayed import decayed as native_decayed
from .native_ops import additive as native_additive
from .recurrence_additive import chunked as own_additive_chunked
from .recurrence_additive import step as own_additive_step
from .recurrence_delta import chunked as own_delta_chunked
from .recurrence_delta import step as own_delta_step

SERIES = "0.6"  # of flash-linear-attention: layouts and defaults have changed between its versions
WIDEST_DELTA = 256  # features; more do not fit into the shared memory of a delta kernel
Result = tuple[Tensor, Tensor]


@cache
def kernels() -> dict[str, Callable[..., Result]] | None:
    """fla's kernels by name, imported once; None where there are none of a version that is known here."""
    try:
        from fla import __version__

        if not __version__.startswith(f"{SERIES}."):
            return None
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
        from fla.ops.gla import chunk_gla, fused_recurrent_gla
        from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla
    except ImportError:
        return None
    return {
        "head chunked": chunk_simple_gla,  # without a decay it is linear attention
        "head step": fused_recurrent_simple_gla,
        "channel chunked": chunk_gla,
        "channel step": fused_recurrent_gla,
        "delta chunked": chunk_gated_delta_rule,
        "delta step": fused_recurrent_gated_delta_rule,
    }


def by_kernel(*tensors: Tensor | None) -> bool:
    """Whether a kernel computes a call with these tensors."""
    backend, given = asked(), [x for x in tensors if x is not None]
    if backend in ("torch", "native") or (backend == "auto" and not given[0].is_cuda):
        return False
    if kernels() is None:
        if backend == "fla":
            raise ImportError(f"LINEARIZE_BACKEND=fla needs flash-linear-attention {SERIES} and triton: linearize's extra 'fla'")
        return False
    return all(x.dtype == torch.float32 and x.numel() > 0 for x in given)


def run(name: str, q: Tensor, state: Tensor, **streams: Tensor | None) -> Result:
    """Kernel `name` on q (B, M, R, T, K), streams (B, M, T, ...) and S (B, M, K, V): (B, M, R, T, V) and the final state.

    fla has heads after time and a state for each, so that what R readers share is repeated for them.
    """
    readers = q.shape[2]
    given = {name: x.repeat_interleave(readers, dim=1).transpose(1, 2) for name, x in streams.items() if x is not None}
    found = kernels()
    assert found is not None
    out, last = found[name](
        q=q.flatten(1, 2).transpose(1, 2),
        **given,
        scale=1.0,
        initial_state=state.repeat_interleave(readers, dim=1),
        output_final_state=True,
    )
    if readers > 1:
        last = last[:, ::readers].clone(memory_format=torch.contiguous_format)
    return out.transpose(1, 2).unflatten(1, (-1, readers)), last


def additive_chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor, terraced: int = 0) -> Result:
    if q.shape[-1] % WIDTH == 0 and (g is None or not terraced) and takes(q, k, v, g, state):
        return native_additive(q, k, v, state, terraced) if g is None else native_decayed(q, k, v, g, state)
    if not by_kernel(q, k, v, g, state) or terraced:
        return own_additive_chunked(q, k, v, g, state, terraced)
    return run("head chunked" if g is None or g.dim() == 3 else "channel chunked", q, state, k=k, v=v, g=g)


def additive_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor) -> Result:
    if not by_kernel(q, k, v, g, state):
        return own_additive_step(q, k, v, g, state)
    k, v, decay = k[:, :, None], v[:, :, None], None if g is None else g[:, :, None]
    if decay is None or decay.dim() == 3:
        out, state = run("head step", q[..., None, :], state, k=k, v=v, g=decay)
    else:
        out, state = run("channel step", q[..., None, :], state, k=k, v=v, gk=decay)
    return out[..., 0, :], state


def tied_chunked(
    q: Tensor, r: Tensor, a: None, k: Tensor, v: Tensor, g: Tensor | None, unit: Tensor, beta: Tensor, state: Tensor, **options: int
) -> Result:
    """The delta engine with r = e^g unit, k = beta unit and a = -k, for kernels that take unit (B, M, T, K) and beta (B, M, T)."""
    if not _tied_by_kernel(q, k, v, g, unit, beta, state) or options.get("terraced"):
        return own_delta_chunked(q, r, a, k, v, g, state, **options)
    return run("delta chunked", q, state, k=unit, v=v, beta=beta, g=torch.zeros_like(beta) if g is None else g)


def tied_step(
    q: Tensor, r: Tensor, a: None, k: Tensor, v: Tensor, g: Tensor | None, unit: Tensor, beta: Tensor, state: Tensor
) -> Result:
    gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, unit, beta, v, g, state))
    if not _tied_by_kernel(q, k, v, g, unit, beta, state) or gradient:  # the kernel for one token has no backward
        return own_delta_step(q, r, a, k, v, g, state)
    out, state = run("delta step", q[..., None, :], state, k=unit, v=v, beta=beta, g=g)
    return out[..., 0, :], state


def _tied_by_kernel(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, unit: Tensor, beta: Tensor, state: Tensor) -> bool:
    fits = (g is None or g.dim() == 3) and unit.shape == k.shape and k.shape[-1] <= WIDEST_DELTA
    return by_kernel(q, unit, beta, v, g, state) and fits
