"""A clock that models move, and a tiny subject of benchmarks that is timed by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from linearize.benchmarks.bounds import Machine
from linearize.benchmarks.subject import Subject
from linearize.modeling.spec import MixerSpec

SPEC = MixerSpec(feature_map="hedgehog", window=8, sinks=2, far_mass="query", share_kv=True)
MACHINE = Machine("float32", threads=1, matmul=1e9, read=1e9, calls=1e6)
CPU = torch.device("cpu")
Cost = Callable[[Any, dict[str, Any]], float]


class Clock:
    """Tells the seconds that it was moved by."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def moves(clock: Clock, model: Any, cost: Cost) -> None:
    """Let each forward pass of the model take `cost` seconds."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        clock.now += cost(module, kwargs)

    model.register_forward_hook(hook, with_kwargs=True)


def tokens_of(kwargs: dict[str, Any]) -> int:
    return int(kwargs["input_ids"].shape[1])


def clock_of(subject: Subject) -> Clock:
    assert isinstance(subject.clock, Clock)
    return subject.clock
