"""Turn a pretrained Hugging Face Transformer into a linear-attention or gated-recurrent model.

`import linearize` makes transformers' Auto classes load linearized checkpoints. Everything else is imported when used.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from linearize._autoload import watch

if TYPE_CHECKING:
    from linearize.conversion.convert import convert, convert_model
    from linearize.conversion.plan import make_plan
    from linearize.distillation.run import distill
    from linearize.loading import load
    from linearize.pipeline import evaluate

try:
    __version__ = version("linearize")
except PackageNotFoundError:  # run from a folder that was never installed
    __version__ = "0.0.0"

_PUBLIC = {
    "convert": "linearize.conversion.convert",
    "convert_model": "linearize.conversion.convert",
    "make_plan": "linearize.conversion.plan",
    "distill": "linearize.distillation.run",
    "evaluate": "linearize.pipeline",
    "load": "linearize.loading",
}

__all__ = ["__version__", "convert", "convert_model", "distill", "evaluate", "load", "make_plan"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'linearize' has no attribute '{name}'")


watch()
