"""Where a model runs and in what dtype, and how fast that is."""

from __future__ import annotations

import time
from typing import Any

import torch

from linearize.errors import ResourceError, UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str) -> torch.device:
    """'auto' is the accelerator if there is one. ResourceError for one that is asked for and missing."""
    if device == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ResourceError(f"device '{device}' is not available", "--device", "--device cpu") from None
    return torch.device(device)


def pick_dtype(dtype: str, stored: Any, device: torch.device) -> torch.dtype:
    """'auto' keeps the stored dtype, except 16 bits on a CPU that has no instructions for it: there it is fp32."""
    if dtype != "auto":
        if dtype not in DTYPES:
            raise UsageError(f"unknown dtype '{dtype}'", "--dtype", f"one of: auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    found = stored if isinstance(stored, torch.dtype) else DTYPES.get(str(stored), torch.float32)
    if device.type == "cpu" and found in (torch.bfloat16, torch.float16) and not fast_bf16():
        return torch.float32
    return found


def fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware; without it they are hundreds of times slower than fp32."""
    return bool(
        torch.cpu._is_avx512_bf16_supported()
        or torch.cpu._is_amx_tile_supported()
        or torch.backends.cpu.get_cpu_capability() == "SVE256"
    )


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int = 512, seconds: float = 0.2) -> float:
    """FLOP/s of square matrix products, measured for about that long."""
    a, b = torch.randn(2, size, size).to(device, dtype)
    count, began, took = 0, time.perf_counter(), 0.0
    while took < seconds:
        a @ b
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        count, took = count + 1, time.perf_counter() - began
    return 2 * size**3 * count / took
