"""The training loop of every stage, on accelerate: the only module that imports it."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from linearize.distillation.state import check_same, latest_state, load_optimizer, save_state
from linearize.errors import Interrupted, ResourceError, TrainingError
from linearize.progress import Progress
from linearize.text import Packed

WARMUP = 0.05
MAX_SKIPPED = 3
SAVE_EVERY_SECONDS = 300.0


def make_accelerator(device: str) -> Accelerator:
    """One process or many; ResourceError where a launcher's processes would each train alone."""
    on_cpu = device == "cpu" or (device == "auto" and not torch.accelerator.is_available())
    accelerator = Accelerator(cpu=on_cpu)
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise ResourceError(
            f"the launcher started {expected} processes, but only {accelerator.num_processes} joined", "distill",
            "start it with: torchrun --nproc_per_node N -m linearize distill DIR",
        )  # fmt: skip
    return accelerator


@dataclass
class Schedule:
    """Rows in an order that depends on (seed, epoch) alone, and a learning rate with warm-up and cosine decay."""

    rows: Packed
    steps: int
    seed: int
    processes: int
    rank: int
    batch: int = 1

    def indices(self, step: int) -> list[int]:
        """This process's rows of a step: the step's rows are dealt out in turn, so that N processes see what one would."""
        first = step * self.batch * self.processes
        wanted = range(first + self.rank, first + self.batch * self.processes, self.processes)
        return [self._row(i) for i in wanted]

    def _row(self, i: int) -> int:
        epoch, place = divmod(i, len(self.rows))
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
        return int(order[place])

    def factor(self, step: int) -> float:
        warm = max(int(self.steps * WARMUP), 1)
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(self.steps - warm, 1))) * 0.95 + 0.05


@dataclass
class Trainer:
    """One stage: `backward(ids, positions)` adds gradients and returns the loss; the trainer does the rest."""

    accelerator: Accelerator
    run: Path
    stage: int
    name: str
    groups: list[dict[str, Any]]
    parameters: Callable[[], dict[str, Tensor]]
    restore: Callable[[dict[str, Tensor]], None]
    backward: Callable[[Tensor, Tensor], float]
    schedule: Schedule
    facts: dict[str, Any]
    done: list[dict[str, Any]]
    progress: Progress
    reduce_gradients: bool
    deadline: float | None = None
    losses: list[float] = field(default_factory=list)
    stopped: int = 0

    def train(self, resume: bool) -> dict[str, Any]:
        """Run the stage's steps; a signal saves and raises Interrupted, a run of non-finite losses TrainingError."""
        optimizer = torch.optim.AdamW(self.groups, weight_decay=0.0)
        rates = [group["lr"] for group in optimizer.param_groups]
        step, skipped, began = self._resume(optimizer) if resume else 0, 0, time.monotonic()
        saved = began
        with self._signals():
            while step < self.schedule.steps:
                loss = self._step(optimizer, rates, step)
                skipped = 0 if math.isfinite(loss) else skipped + 1
                if skipped >= MAX_SKIPPED:
                    raise TrainingError(
                        f"the loss was not finite {MAX_SKIPPED} times in a row",
                        f"{self.name}, step {step}",
                        "a lower learning rate",
                    )
                step += 1
                self._report(step, loss, began)
                now = time.monotonic()
                if self._any(self.stopped):
                    self._save(optimizer, step)
                    raise Interrupted(self._any(self.stopped), f"{self.name}, step {step} of {self.schedule.steps}")
                if now - saved > SAVE_EVERY_SECONDS:
                    self._save(optimizer, step)
                    saved = now
                if self._any(int(self.deadline is not None and now > self.deadline)):
                    break
        return {
            "steps": step,
            "seconds": time.monotonic() - began,
            "first_loss": _mean(self.losses[:4]),
            "last_loss": _mean(self.losses[-4:]),
        }

    def _step(self, optimizer: torch.optim.Optimizer, rates: list[float], step: int) -> float:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * self.schedule.factor(step)
        optimizer.zero_grad(set_to_none=True)
        index = self.schedule.indices(step)
        device = self.accelerator.device
        loss = self.backward(self.schedule.rows.ids[index].to(device), self.schedule.rows.positions[index].to(device))
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        if self.reduce_gradients and self.accelerator.num_processes > 1:
            for parameter in trained:
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        norm = nn.utils.clip_grad_norm_(trained, 1.0) if self.name != "attention" else _norm(trained)
        total = self.accelerator.reduce(torch.tensor([loss], device=device), "mean")
        if not (math.isfinite(float(total)) and bool(torch.isfinite(norm))):
            return math.nan
        optimizer.step()
        self.losses.append(float(total))
        return float(total)

    def _report(self, step: int, loss: float, began: float) -> None:
        rows = step * self.schedule.batch * self.schedule.processes
        tokens = rows * self.schedule.rows.ids.shape[1]
        speed = tokens / max(time.monotonic() - began, 1e-9)
        self.progress(
            f"distill: {self.name}", step, self.schedule.steps, loss=round(loss, 5), tokens=tokens, tokens_per_second=round(speed)
        )
        if self.accelerator.is_main_process:
            line = {
                "stage": self.name,
                "step": step,
                "loss": loss if math.isfinite(loss) else None,
                "tokens": tokens,
                "seconds": round(time.monotonic() - began, 2),
            }
            with (self.run / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _save(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        if self.accelerator.is_main_process:
            save_state(self.run, self.stage, step, self.parameters(), optimizer, {**self.facts, "done": self.done})
        self.accelerator.wait_for_everyone()

    def _resume(self, optimizer: torch.optim.Optimizer) -> int:
        found = latest_state(self.run)
        if found is None or found[0]["stage"] != self.stage:
            return 0
        facts, parameters, moments = found
        check_same(facts, self.facts)
        self.restore(parameters)
        load_optimizer(optimizer, moments)
        return int(facts["step"])

    def _any(self, value: int) -> int:
        """The largest value of any process, so that all of them stop at the same step."""
        if self.accelerator.num_processes == 1:
            return value
        values = self.accelerator.gather(torch.tensor([value], device=self.accelerator.device))
        return int(values.max())

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM set a flag that is read after each step; a second SIGINT leaves at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, _: FrameType | None) -> None:
            if self.stopped:
                raise KeyboardInterrupt
            self.stopped = number

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _norm(parameters: list[nn.Parameter]) -> Tensor:
    grads = [p.grad for p in parameters if p.grad is not None]
    return nn.utils.get_total_norm(grads) if grads else torch.zeros(())
