"""Loading a linearized checkpoint, checked against its manifest, in a dtype that the device computes fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from linearize.devices import pick_device, pick_dtype
from linearize.errors import UsageError
from linearize.modeling.modeling_linearized import PREFIX, linearized_class, register
from linearize.modeling.native import keep_memory
from linearize.opening import check

ADAPTER = "adapter"  # a folder of the checkpoint's, where LoRA was kept apart


def class_of(path: Path) -> tuple[Any, dict[str, Any]]:
    """The model class of a linearized checkpoint whose files are whole, and its config."""
    config = check(path)
    register([config["model_type"].removeprefix(PREFIX)])  # it may be of a family that the registry does not know
    return linearized_class(config["architectures"][0].removeprefix("Linearized")), config


def check_adapter_apart(directory: Path) -> None:
    """UsageError for a checkpoint that holds an adapter apart, where only whole weights will do."""
    if (directory / ADAPTER).is_dir():
        raise UsageError("this checkpoint keeps its adapter apart", str(directory), f"linearize merge {directory}")


def load(directory: str | Path, *, dtype: str = "auto", device: str = "auto", adapter: bool = True) -> tuple[Any, Any]:
    """Model (in eval mode) and tokenizer of a linearized checkpoint, with the adapter beside it at work where there is one.

    On a CPU with kernels this process uses the memory of large tensors again from then on.
    """
    path = Path(directory)
    made, config = class_of(path)
    where = pick_device(device)
    chosen = pick_dtype(dtype, config.get("dtype", "float32"), where)
    if where.type == "cpu":
        keep_memory()
    model: Any = made.from_pretrained(path, dtype=chosen)  # in eval mode, on the CPU
    if adapter and (path / ADAPTER).is_dir():
        model.load_adapter(str(path / ADAPTER))
        model.eval()
    if where != model.device:  # to go through all modules takes milliseconds
        model = model.to(where)
    return model, AutoTokenizer.from_pretrained(path)
