"""What is measured: a student, its teacher as a stock model, and the same network without attention, on the same weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from linearize.benchmarks.bounds import Machine, bounded
from linearize.conversion.teacher import unconverted
from linearize.devices import Clock, clock_of
from linearize.errors import InputError
from linearize.evaluation.environment import environment
from linearize.evaluation.speed import random_ids
from linearize.loading import check_adapter_apart, load
from linearize.opening import check, need_decoder
from linearize.progress import Progress, silent

FLOOR = "linearize_floor"


def own_values(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """Attention that mixes nothing: each token gets its own value. What is left is the cost of all else."""
    return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2), None


def no_mask(*_: Any, **__: Any) -> None:
    return None


AttentionInterface.register(FLOOR, own_values)
AttentionMaskInterface.register(FLOOR, no_mask)


@dataclass
class Subject:
    """A student in memory, with what it is compared to; `clock` tells seconds, `measure` what the machine does in one."""

    name: str
    model: Any
    tokenizer: Any
    measure: Callable[[], Machine]
    clock: Clock
    progress: Progress = silent

    def __post_init__(self) -> None:
        self.machine = self.measure()

    @property
    def device(self) -> torch.device:
        return self.model.device  # type: ignore[no-any-return]

    @property
    def plan(self) -> Any:
        return self.model.config.linearize

    @cached_property
    def teacher(self) -> Any:
        """The stock model, in the form of attention that transformers itself chooses."""
        return unconverted(self.model)

    @cached_property
    def floor(self) -> Any:
        """The stock model with its attention replaced by nothing: what no mixer can be faster than."""
        model = unconverted(self.model)
        for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
            config._attn_implementation_internal = FLOOR
        return model

    def text(self, length: int, batch: int = 1) -> Tensor:
        """Token ids (batch, length)."""
        return random_ids(self.model.config.vocab_size, length).expand(batch, -1).to(self.device)

    def report(self, benchmark: str, settings: dict[str, Any], rows: list[dict[str, Any]], **found: Any) -> dict[str, Any]:
        """What a benchmark found, with all that its figures depend on; the machine is measured again, and counts at its best."""
        machine = self.machine.best(self.measure())
        return {
            "benchmark": benchmark, "model": self.name, "method": self.plan["method"], "machine": asdict(machine),
            "environment": environment(self.model, 0), "settings": settings, "rows": [bounded(one, machine) for one in rows],
            **found,
        }  # fmt: skip


def check_subject(directory: Path, lengths: Sequence[int] = ()) -> None:
    """Errors where a checkpoint cannot be measured, or not at these lengths, before anything is loaded."""
    plan = check(directory)["linearize"]
    need_decoder(plan, str(directory), "these benchmarks are")
    check_adapter_apart(directory)
    limit = plan.get("max_positions")
    if limit and lengths and max(lengths) > limit:
        raise InputError(f"this model has positions for {limit} tokens, not {max(lengths)}", str(directory), "shorter lengths")


def open_subject(
    directory: Path, dtype: str = "auto", device: str = "auto", lengths: Sequence[int] = (), progress: Progress = silent
) -> Subject:
    """Load a checkpoint and measure the machine in its dtype."""
    check_subject(directory, lengths)
    progress("load", 0, 1)
    model, tokenizer = load(directory, dtype=dtype, device=device)
    progress("load", 1, 1)
    measure = partial(Machine.measure, model.dtype, model.device)
    return Subject(str(directory), model, tokenizer, measure, clock_of(model.device), progress)
