"""llama.cpp on a GGUF file beside the student, through llama-cpp-python, where that is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from linearize.errors import ResourceError, UsageError

NAME, PACKAGE = "llama.cpp", "llama-cpp-python"
CHUNK = 512  # tokens that it reads in one go


def need(file: Path) -> None:
    """ResourceError where the package is missing, UsageError where the file is."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise ResourceError(f"{PACKAGE} is not installed", "--llama-cpp", f"pip install {PACKAGE}")
    if not file.is_file():
        raise UsageError("no such file", str(file), "--llama-cpp MODEL.gguf")


class Reader:
    """A GGUF model that reads random tokens and then goes on a token at a time, with as many threads as torch has."""

    def __init__(self, file: Path, room: int) -> None:
        from llama_cpp import Llama

        threads = torch.get_num_threads()
        self.nbytes = file.stat().st_size
        self.model: Any = Llama(
            model_path=str(file), n_ctx=room, n_batch=CHUNK, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def at(self, context: int) -> Callable[[], object]:
        """What takes in one more token after so many."""
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(self.model.n_vocab(), (context + 1,), generator=draw).tolist()
        self.model.reset()
        self.model.eval(ids[:context])
        return lambda: self.model.eval(ids[context:])
