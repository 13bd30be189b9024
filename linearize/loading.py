"""Loading a linearized checkpoint, checked against its manifest, in a dtype that the device computes fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from linearize.devices import pick_device, pick_dtype
from linearize.modeling.modeling_linearized import PREFIX, linearized_class, register
from linearize.opening import check


def class_of(path: Path) -> tuple[Any, dict[str, Any]]:
    """The model class of a linearized checkpoint whose files are whole, and its config."""
    config = check(path)
    register([config["model_type"].removeprefix(PREFIX)])  # it may be of a family that the registry does not know
    return linearized_class(config["architectures"][0].removeprefix("Linearized")), config


def load(directory: str | Path, *, dtype: str = "auto", device: str = "auto") -> tuple[Any, Any]:
    """Model (in eval mode) and tokenizer of a linearized checkpoint."""
    path = Path(directory)
    made, config = class_of(path)
    where = pick_device(device)
    chosen = pick_dtype(dtype, config.get("dtype", "float32"), where)
    model: Any = made.from_pretrained(path, dtype=chosen)
    model = model.to(where).eval()
    return model, AutoTokenizer.from_pretrained(path)
