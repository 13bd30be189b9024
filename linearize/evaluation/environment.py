"""Where figures were measured: versions, processor, threads, dtype."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from linearize.modeling.native import asked, library

PACKAGES = ("linearize", "torch", "transformers", "peft", "accelerate", "flash-linear-attention", "lm-eval")


def environment(model: Any, seed: int) -> dict[str, Any]:
    """Names and values; nothing that tells who or where the user is."""
    return {
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(model.device),
        "threads": torch.get_num_threads(),
        "kernels": _kernels(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "seed": seed,
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _kernels(device: torch.device) -> str:
    """Who computes what a kernel could: see modeling.native and modeling.backends."""
    backend = asked()
    if device.type == "cpu" and backend in ("auto", "native"):
        return "linearize's, C++" if library() is not None else "none, PyTorch"
    return backend


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {os.cpu_count()} cores"
