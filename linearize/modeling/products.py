"""Matrix products of float32 by the kernel that is fast on a CPU, exact to the last bits.

PyTorch multiplies float32 by MKL, whose kernels on processors of other makers use half of the vector unit or less. oneDNN's use
all of it, but PyTorch hands it float32 only where it may round to bfloat16. On processors without a matrix unit it then does not
round: it multiplies float32, up to three times as fast as MKL. Whether it rounds is tried, once a process; where it does, or
there is no oneDNN, products are PyTorch's own.
"""

from __future__ import annotations

import itertools
import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

try:
    import torch
    from torch import Tensor
    from torch.autograd.function import once_differentiable
except ImportError as error:
    raise ImportError("linearize models need torch") from error

LOG2E = math.log2(math.e)
LN2 = math.log(2)
ALLOWED = "bf16"  # the precision to which oneDNN may round
LARGE = 2**14  # numbers of a matrix that is not worth a copy


def exp(x: Tensor) -> Tensor:
    """e^x as 2^(x log2 e), which PyTorch computes many times faster on a CPU."""
    return torch.exp2(x * LOG2E)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for (..., I, J) and (..., J, K); leading dimensions of one are repeated."""
    if not by_onednn(a):
        return a @ b
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        found: Tensor = _Product.apply(a, b)  # type: ignore[no-untyped-call]
        return found
    return multiply(a, b)


class _Product(torch.autograd.Function):
    """A product whose gradients are made by the same kernel."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return multiply(a, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        of_a = multiply(grad, b.mT).sum_to_size(a.shape) if ctx.needs_input_grad[0] else None
        of_b = multiply(a.mT, grad).sum_to_size(b.shape) if ctx.needs_input_grad[1] else None
        return of_a, of_b


def multiply(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """The product without a gradient, into `out` if given."""
    if not by_onednn(a):
        return torch.matmul(a, b, out=out)
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = ALLOWED
    try:
        return _one_by_one(a, b) if out is None and _scattered(a, b) else torch.matmul(a, b, out=out)
    finally:
        setting.fp32_precision = before


def _scattered(*factors: Tensor) -> bool:
    """Whether large matrices lie apart in memory: parts of a batch, which would be copied before they are multiplied."""
    apart = any(x.dim() > 2 and not x.is_contiguous() and not x.mT.is_contiguous() for x in factors)
    return apart and min(x.shape[-2:].numel() for x in factors) >= LARGE


def _one_by_one(a: Tensor, b: Tensor) -> Tensor:
    leading = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    out = a.new_empty(*leading, a.shape[-2], b.shape[-1])
    a, b = (x.expand(*leading, -1, -1) for x in (a, b))
    for i in itertools.product(*map(range, leading)):
        torch.mm(a[i], b[i], out=out[i])
    return out


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """No product on the device of x is cast. Where none would be, there is no context at which a trace would cut its graph."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def by_onednn(a: Tensor) -> bool:
    """Whether oneDNN makes the products of a tensor."""
    return a.dtype == torch.float32 and a.is_cpu and not torch.compiler.is_compiling() and rounds_nothing()


@cache
def rounds_nothing() -> bool:
    """Whether oneDNN, allowed to round float32 to bfloat16, does not.

    Whole numbers of eleven bits, whose products and sums float32 holds exactly, would lose bits in bfloat16, which has eight.
    """
    backend: Any = torch.backends.mkldnn
    if not backend.is_available() or not hasattr(backend, "matmul"):
        return False
    before = backend.matmul.fp32_precision
    backend.matmul.fp32_precision = ALLOWED
    try:
        for size in (64, 192):  # kernels differ by size
            wide = torch.arange(size * size, dtype=torch.float32, device="cpu").view(size, size) * 89 % 683 + 1025
            narrow = (wide * 7) % 51 - 25
            for a, b in ((wide, narrow), (narrow, wide)):
                a, b = a.expand(4, -1, -1).contiguous(), b.expand(4, -1, -1).contiguous()
                if not torch.equal(a @ b, (a.double() @ b.double()).float()):
                    return False
    finally:
        backend.matmul.fp32_precision = before
    return True
