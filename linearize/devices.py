"""Where a model runs and in what dtype, how fast that is, and how much memory there is."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from linearize.errors import ResourceError, UsageError

Clock = Callable[[], float]
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


def clock_of(device: torch.device) -> Clock:
    """A clock that is read once the device has done all that it was told."""
    if device.type == "cpu":
        return time.perf_counter

    def read() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return read


def fastest(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest call of those made in about so many seconds: what the machine does when nothing else disturbs it."""
    clock = clock_of(device)
    began = now = clock()
    best = float("inf")
    while now - began < seconds:
        run()
        before, now = now, clock()
        best = min(best, now - before)
    return best


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int = 512, seconds: float = 0.2) -> float:
    """FLOP/s of square matrix products, measured for about that long."""
    a, b = torch.randn(2, size, size).to(device, dtype)
    return 2 * size**3 / fastest(lambda: a @ b, device, seconds)


def read_rate(device: torch.device, nbytes: int = 1 << 28, seconds: float = 0.2) -> float:
    """Bytes/s at which so many, far more than a cache holds, are read and added up, measured for about that long."""
    x = torch.ones(nbytes // 4, device=device)
    return nbytes / fastest(x.sum, device, seconds)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that the device, or on a CPU this process, has held so far, or since `forget_peak`."""
    if device.type != "cpu":
        return int(torch.accelerator.max_memory_allocated(device))
    if (own := _status("VmHWM")) is not None:  # getrusage would count what the parent held when it started this process
        return own
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak(device: torch.device) -> bool:
    """Let `peak_memory` begin again at what is held now; False where the system cannot."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def held_memory(device: torch.device) -> int:
    """Bytes that the device, or on a CPU this process, holds now; on a CPU whose system does not tell, the most it held."""
    if device.type != "cpu":
        return int(torch.accelerator.memory_allocated(device))
    own = _status("VmRSS")
    return peak_memory(device) if own is None else own


def machine_memory(device: torch.device) -> int:
    """Bytes that the device, or on a CPU the machine, has in all."""
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(torch.accelerator.get_memory_info(device)[1])


def _status(key: str) -> int | None:
    """A line of Linux's account of this process, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


@cache
def _openmp() -> Any:
    """GNU's OpenMP where this process computes with it."""
    try:
        return ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOW | os.RTLD_NOLOAD)
    except (AttributeError, OSError):  # another system, or another OpenMP
        return None


def let_threads_go() -> bool:
    """End the threads that OpenMP keeps for the calling one, so that another computes as fast as this did; False where none can be.

    GNU's wait for work without sleeping only while those of a process, whichever thread they are kept for, are no more than its
    processors.
    """
    pause = getattr(_openmp(), "omp_pause_resource_all", None)  # OpenMP 5.0, section 3.2.44
    return pause is not None and pause(1) == 0  # softly: what was set stays
