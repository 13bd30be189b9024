"""Loading a linearized checkpoint, checked against its manifest, in a dtype that the device computes fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from linearize.errors import ResourceError, UsageError
from linearize.modeling.modeling_linearized import PREFIX, register
from linearize.opening import check

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


def load(directory: str | Path, *, dtype: str = "auto", device: str = "auto") -> tuple[Any, Any]:
    """Model (in eval mode) and tokenizer of a linearized checkpoint."""
    path = Path(directory)
    config = check(path)
    where = pick_device(device)
    chosen = pick_dtype(dtype, config.get("dtype", "float32"), where)
    register([config["model_type"].removeprefix(PREFIX)])  # it may be of a family that the registry does not know
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=chosen)
    model = model.to(where).eval()
    return model, AutoTokenizer.from_pretrained(path)
