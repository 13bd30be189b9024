"""The training loop of every stage, on accelerate: the only module that imports it."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from torch import Tensor, nn

from linearize.devices import peak_memory
from linearize.distillation.guard import IN_A_ROW, SKIPPED, Guard, check_finite, drawn, worst_layer
from linearize.distillation.launching import check_joined, meant
from linearize.distillation.metrics import append, forget_after, worst
from linearize.distillation.sharding import gather_moments, make_optimizer
from linearize.distillation.state import check_same, latest_state, load_optimizer, save_state
from linearize.errors import Interrupted, ResourceError, TrainingError, UsageError
from linearize.progress import Progress
from linearize.text import Packed

WARMUP = 0.05
SAVE_EVERY_SECONDS = 300.0


def make_accelerator(device: str, report_to: Sequence[str] = (), folder: Path | None = None) -> Accelerator:
    """One process or many, with trackers of those names writing to `folder`.

    ResourceError where a launcher's processes would each train alone, and where a tracker is not installed.
    """
    check_trackers(report_to)
    expected = meant(os.environ)
    on_cpu = device == "cpu" or (device == "auto" and not torch.accelerator.is_available())
    accelerator = Accelerator(cpu=on_cpu, log_with=list(report_to) or None, project_dir=folder)
    check_joined(expected, accelerator.num_processes)
    return accelerator


def check_trackers(names: Sequence[str]) -> None:
    """Accelerate leaves out a tracker that is not installed; here it is a ResourceError."""
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UsageError(f"unknown tracker '{name}'", "--report-to", f"one of: {', '.join(LOGGER_TYPE_TO_CLASS)}")
        if name not in map(str, get_available_trackers()):
            raise ResourceError(f"{name} is not installed", "--report-to", f"pip install {name}")


@dataclass
class Schedule:
    """Rows in an order that depends on (seed, epoch) alone, and a learning rate with warm-up and cosine decay.

    `processes` have rows of their own, of which this is number `rank`: 1 and 0 where all share each row.
    """

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


class Task(Protocol):
    """What a stage does with rows (B, T): `backward` adds gradients and returns the loss."""

    @property
    def by_layer(self) -> Mapping[int, float]:
        """The last step's losses, where each layer has its own."""

    def backward(self, ids: Tensor, positions: Tensor) -> float: ...


@dataclass(frozen=True)
class Saving:
    """When the state is saved, every so many steps or else every few minutes, and how many of the last are kept."""

    every: int | None = None
    keep: int = 2


BY_TIME = Saving()


@dataclass
class Trainer:
    """One stage: its task adds gradients; the trainer does the rest."""

    accelerator: Accelerator
    run: Path
    stage: int
    name: str
    groups: list[dict[str, Any]]
    parameters: Callable[[], dict[str, Tensor]]
    restore: Callable[[dict[str, Tensor]], None]
    named: Mapping[str, nn.Parameter]
    task: Task
    schedule: Schedule
    facts: dict[str, Any]
    done: list[dict[str, Any]]
    progress: Progress
    reduce_gradients: bool
    saving: Saving = BY_TIME
    deadline: float | None = None
    losses: list[float] = field(default_factory=list)
    stopped: int = 0
    before: int = 0  # steps of the stages before, for trackers that know one count
    sharded: bool = False  # the optimizer's moments are spread over the processes
    rate: float = 1.0  # of the schedule's: half of it after a roll-back

    def train(self, resume: bool) -> dict[str, Any]:
        """Run the stage's steps. A signal saves and raises Interrupted.

        Steps whose loss is not finite are skipped; several in a row bring the last saved state back, at half the rate; when
        that happens again it is a TrainingError.
        """
        self.guard = Guard(self.run / SKIPPED, self.name)
        optimizer = make_optimizer(self.groups, self.sharded)
        rates = [group["lr"] for group in optimizer.param_groups]
        step, began = self._resume(optimizer) if resume else 0, time.monotonic()
        if step == 0:
            self._save(optimizer, 0)
        saved = began
        with self._signals():
            while step < self.schedule.steps:
                loss = self._step(optimizer, rates, step)
                if self.guard.saw(loss):
                    step = self._roll_back(optimizer, step)
                    continue
                step += 1
                self._report(step, loss, began)
                now = time.monotonic()
                if self._any(self.stopped):
                    self._save(optimizer, step)
                    raise Interrupted(self._any(self.stopped), f"{self.name}, step {step} of {self.schedule.steps}")
                every = self.saving.every
                if self._any(int(now - saved > SAVE_EVERY_SECONDS if every is None else step % every == 0)):
                    self._save(optimizer, step)
                    saved = now
                if self._any(int(self.deadline is not None and now > self.deadline)):
                    break
        check_finite(self.parameters().items(), f"{self.name}, step {step}", self._kept())
        return {
            "steps": step,
            "skipped": self.guard.skipped,
            "seconds": time.monotonic() - began,
            "first_loss": _mean(self.losses[:4]),
            "last_loss": _mean(self.losses[-4:]),
        }

    def _step(self, optimizer: torch.optim.Optimizer, rates: list[float], step: int) -> float:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * self.rate * self.schedule.factor(step)
        optimizer.zero_grad(set_to_none=True)
        index = self.schedule.indices(step)
        device = self.accelerator.device
        ids, positions = self.schedule.rows.ids[index].to(device), self.schedule.rows.positions[index].to(device)
        with drawn(device, self.schedule.seed, self.stage, step, self.schedule.rank):
            loss = self.task.backward(ids, positions)
        trained = [p for group in self.groups for p in group["params"]]
        if self.reduce_gradients and self.accelerator.num_processes > 1:
            for parameter in trained:
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        norm = nn.utils.clip_grad_norm_(trained, 1.0) if self.name != "attention" else _norm(trained)
        total = self.accelerator.reduce(torch.tensor([loss], device=device), "mean")
        if not (math.isfinite(float(total)) and bool(torch.isfinite(norm))):
            if self.accelerator.process_index < self.schedule.processes:
                self.guard.keep(step, self.schedule.rank, ids, positions)
            return math.nan
        optimizer.step()
        self.losses.append(float(total))
        return float(total)

    def _report(self, step: int, loss: float, began: float) -> None:
        rows = step * self.schedule.batch * self.schedule.processes
        tokens = rows * self.schedule.rows.ids.shape[1]
        speed = tokens / max(time.monotonic() - began, 1e-9)
        told: dict[str, Any] = {"loss": round(loss, 5), "tokens": tokens, "tokens_per_second": round(speed)}
        memory, skipped = peak_memory(self.accelerator.device), self.guard.skipped
        seen = {"memory": f"{memory / 1e9:.1f} GB", "worst": worst(self.task.by_layer), "skipped": skipped}
        self.progress(f"distill: {self.name}", step, self.schedule.steps, **told, **{k: v for k, v in seen.items() if v})
        if self.accelerator.is_main_process:
            rate = self.rate * self.schedule.factor(step - 1)
            line = {"stage": self.name, "step": step, **told, "loss": loss, "rate": rate, "memory": memory, "skipped": skipped}
            seconds = round(time.monotonic() - began, 2)
            append(self.run, {**line, "seconds": seconds, "layers": {str(i): x for i, x in self.task.by_layer.items()}})
            values = {f"{self.name}/{key}": x for key, x in line.items() if key not in ("stage", "step")}
            self.accelerator.log(values, step=self.before + step)

    def _save(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        parameters = self.parameters()
        check_finite(parameters.items(), f"{self.name}, step {step}", self._kept())
        gather_moments(optimizer)
        if self.accelerator.is_main_process:
            guard = {"skipped": self.guard.skipped, "in_a_row": self.guard.in_a_row}
            facts = {**self.facts, "done": self.done, "rate": self.rate, "losses": self.losses[:4], **guard}
            save_state(self.run, self.stage, step, parameters, optimizer, facts, self.saving.keep)
        self.accelerator.wait_for_everyone()

    def _resume(self, optimizer: torch.optim.Optimizer) -> int:
        found = latest_state(self.run)
        if found is None or found[0]["stage"] != self.stage:
            return 0
        facts, parameters, moments = found
        check_same(facts, self.facts)
        self.restore(parameters)
        load_optimizer(optimizer, moments)
        self.rate, self.losses = float(facts["rate"]), list(facts["losses"])
        self.guard.skipped, self.guard.in_a_row = int(facts["skipped"]), int(facts["in_a_row"])
        if self.accelerator.is_main_process:
            forget_after(self.run, self.name, int(facts["step"]))
        return int(facts["step"])

    def _roll_back(self, optimizer: torch.optim.Optimizer, step: int) -> int:
        """The last saved state again, at half the rate; TrainingError the second time."""
        skipped, where = self.guard.skipped, f"{self.name}, step {step}, worst {worst_layer(self.named)}"
        if self.rate < 1:
            what = f"the loss was not finite {IN_A_ROW} times in a row, again at half the learning rate"
            raise TrainingError(what, where, self._kept())
        step = self._resume(optimizer)
        self.rate, self.guard.skipped, self.guard.in_a_row = 0.5, skipped, 0
        return step

    def _kept(self) -> str:
        """What is left of a run that failed, for the second line of its error."""
        return f"the last good state is in {self.run}, rows that failed in {self.guard.folder}; try other data or a lower rate"

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
