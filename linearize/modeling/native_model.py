"""What a model does of its own by kernels, in float32 or bfloat16, without gradients: rounded as PyTorch rounds."""

from __future__ import annotations

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .native import WIDTH, call, rows, takes_frozen

ENDS = {torch.float32: "float", torch.bfloat16: "half"}  # of the kernels' names


def takes_own(*tensors: Tensor) -> bool:
    """Whether kernels compute a call with a model's own tensors, all of one dtype, their last dimension a multiple of WIDTH."""
    dtype = tensors[0].dtype
    return dtype in ENDS and all(x.shape[-1] % WIDTH == 0 for x in tensors) and takes_frozen(*tensors, dtype=dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """w (x / sqrt(mean x^2 + eps)) of x (..., D) and w (D,), the bracket in float32, then rounded (Zhang, Sennrich 2019, 4)."""
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    call(f"rms_norm_{ENDS[x.dtype]}", x, weight, y, x.numel() // x.shape[-1], x.shape[-1], float(eps))
    return y


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, of one shape; silu(gate) is rounded first (Shazeer 2020, 2)."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    call(f"swiglu_{ENDS[gate.dtype]}", gate, up, y, gate.numel())
    return y


def rope_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`native_ops.rope` of x, cos and sin in bfloat16."""
    x, cos, sin = rows(x), cos.contiguous(), sin.contiguous()
    y = x.new_empty(x.shape)
    call("rope_half", x, cos, sin, y, *x.stride()[:3], *x.shape, cos.shape[-1], 0 if len(cos) == 1 else cos.stride(0))
    return y
