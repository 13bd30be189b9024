"""One row of bf16 times a matrix on a CPU where no kernel of ours does it: PyTorch's own reads the matrix once.

oneDNN, which PyTorch prefers, lays the matrix out anew in every call: 18.6 ms instead of 7.9 for the matrices of SmolLM2-135M on
two AVX512 cores. Which of the two is used is a switch of the whole process, and without oneDNN products of many rows are slow:
it is turned only while no other call of a model made here runs, and turned back where one begins in another thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock
from typing import Any

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError("linearize models need torch") from error

ROWS = 2  # at three the two are as fast as each other

_lock = Lock()
_running = 0
_turned = False


def products(weight: Tensor, tokens: Tensor) -> AbstractContextManager[None]:
    """A call of a model with such weights on tokens (B, T, ...): without oneDNN where that is faster and nothing else runs."""
    if torch.compiler.is_compiling():
        return nullcontext()
    few = tokens.shape[0] * tokens.shape[1] <= ROWS
    return _products(few and weight.device.type == "cpu" and weight.dtype == torch.bfloat16)


@contextmanager
def _products(alone: bool) -> Iterator[None]:
    global _running
    with _lock:
        _running += 1
        _turn(alone and _running == 1)
    try:
        yield
    finally:
        with _lock:
            _running -= 1
            _turn(False)


def _turn(off: bool) -> None:
    """Only what was switched off here is switched on again."""
    global _turned
    switch: Any = torch.backends.mkldnn
    if off != _turned and (_turned or switch.enabled):
        switch.enabled, _turned = not off, off
