"""Stage attention for a model that does not fit in memory: one block of layers at a time, on what its first layer reads.

A layer learns from the teacher's own inputs, so that no layer's update depends on another's mixer: there is no clipping over
layers, AdamW works by parameter, and what is drawn depends on the layer. Blocks therefore give what all layers at once do, to
the bit with one row a step and up to the rounding of products of other batches where more rows a step come again in another
epoch. One thing differs: a step that is skipped, for its loss was not finite, is skipped for the layers of its block alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from linearize.checkpoint import staged, verify
from linearize.conversion.offload import Shards
from linearize.conversion.preflight import safetensors_header
from linearize.distillation.guard import SKIPPED
from linearize.distillation.loop import Saving, Schedule, Trainer
from linearize.distillation.metrics import METRICS, append
from linearize.distillation.stages import AttentionTransfer
from linearize.distillation.state import check_same, latest_state
from linearize.distillation.streaming_cache import LayerInputs, row_keys
from linearize.distillation.streaming_model import Skeleton
from linearize.errors import InputError, IntegrityError, ResourceError, UsageError
from linearize.methods.base import ATTENTION, Stage
from linearize.modeling.modeling_linearized import mode
from linearize.progress import Progress
from linearize.text import Packed

if TYPE_CHECKING:
    from accelerate import Accelerator

BEGUN = "stream.json"
PARAMETERS, REPORT = "parameters.safetensors", "report.json"
STATES = 4  # a block's mixers and its two moments in each saved state, and the mixers again when it is done
FREE_SHARE = 0.5  # of the disk, at most, for layer inputs, unless it is said


@dataclass(frozen=True)
class Streaming:
    """So many layers at a time, and how many GB (10^9 bytes) of layer inputs may be on disk; None: half of what is free."""

    layers: int
    cache: float | None = None


def check_streaming(stages: Sequence[Stage], processes: int, spread: Mapping[str, Any]) -> None:
    """UsageError for what is not done layer by layer."""
    for option, wanted in spread.items():
        if wanted:
            name = {"precision": "mixed-precision"}.get(option, option.replace("_", "-"))
            raise UsageError("layers that are streamed are in memory one after another", f"--{name}", "leave it out")
    if [stage.kind for stage in stages] != [ATTENTION]:
        what = "only one stage attention runs a few layers at a time"
        raise UsageError(what, f"--stream-layers with {', '.join(stage.kind for stage in stages)}", "--stage attention")
    if processes > 1:
        raise UsageError(f"layers are streamed by one process, not {processes}", "--stream-layers", "start it without a launcher")


def check_begun(run: Path, streaming: Streaming | None, resume: bool, overwrite: bool) -> None:
    """InputError where a run of blocks would be lost, or taken up by one that is not of its kind."""
    begun = json.loads((run / BEGUN).read_text(encoding="utf-8")) if (run / BEGUN).exists() else None
    if begun is not None and not (resume or overwrite):
        fix = "--resume auto goes on with it; --overwrite begins anew"
        raise InputError(f"a run with --stream-layers {begun['stream_layers']} was interrupted here", str(run), fix)
    if resume and begun is not None and streaming is None:
        fix = f"--stream-layers {begun['stream_layers']}, or begin anew with --overwrite and without --resume"
        raise InputError("the run was begun with --stream-layers", str(run), fix)
    if resume and begun is None and streaming is not None and latest_state(run) is not None:
        fix = "leave --stream-layers out, or begin anew with --overwrite and without --resume"
        raise InputError("the run was begun without --stream-layers", str(run), fix)


def stream_attention(
    accelerator: Accelerator, skeleton: Skeleton, stage: Stage, rows: Packed, run: Path, facts: Mapping[str, Any], *,
    streaming: Streaming, batch: int, seed: int, resume: bool, saving: Saving, progress: Progress,
) -> list[dict[str, Any]]:  # fmt: skip
    """Train the mixers of every block in turn; afterwards the skeleton reads them too. Returns the stage's report.

    `facts` are those of the run, with the stage as it is listed in `stages`.
    """
    schedule = Schedule(rows, max(round(stage.tokens / (batch * rows.ids.shape[1])), 1), seed, 1, 0, batch)
    mixers = skeleton.mixers(range(len(skeleton.layers)))
    plain = {key: x for key, x in facts.items() if key != "stages"}
    report: dict[str, Any] = {**facts["stages"][0], **plain, "trained": [], "merged": False, "sequence": rows.ids.shape[1]}
    if not mixers:
        return [{**report, "tokens": 0, "steps": 0, "note": "the method has no parameter to transfer"}]
    rate = stage.mixer_lr or stage.lr
    count = sum(p.numel() for p in mixers.values())
    report["trained"].append({"group": "mixers", "parameters": count, "dtype": "float32", "lr": rate})
    blocks = Blocks(
        accelerator, skeleton, stage, schedule, run, {**facts, "stream_layers": streaming.layers}, saving, progress, rate
    )
    blocks.begin(streaming, resume)
    progress(f"distill: {stage.kind}", 0, 1, trained=report["trained"])
    found = [blocks.train(number, layers, resume) for number, layers in enumerate(blocks.spans)]
    merge_metrics(run, [blocks.done(number) for number in range(len(found))])
    tokens = schedule.steps * batch * rows.ids.shape[1]
    return [{**report, "stream_layers": streaming.layers, **joined([one for one in found if one["layers"]]), "tokens": tokens}]


class BlockTransfer(AttentionTransfer):
    """Attention transfer of the layers that are in memory; what the last of them gives is kept in `after`."""

    def __init__(self, skeleton: Skeleton, stage: Stage, before: LayerInputs, after: LayerInputs | None) -> None:
        super().__init__(skeleton.model, stage)
        self.skeleton, self.before, self.after = skeleton, before, after

    def read(self, ids: Tensor, positions: Tensor) -> None:
        keys = row_keys(ids, positions)
        left = self.skeleton.read(positions, hidden=self.before.read(keys).to(positions.device))
        if self.after is not None:
            self.after.write(keys, left.hidden, left.in_tuple)


@dataclass
class Blocks:
    """The blocks of one run, their layer inputs and what is left of each when it is done, in the run's folder."""

    accelerator: Accelerator
    skeleton: Skeleton
    stage: Stage
    schedule: Schedule
    run: Path
    facts: dict[str, Any]
    saving: Saving
    progress: Progress
    rate: float

    def __post_init__(self) -> None:
        total, size = len(self.skeleton.layers), self.facts["stream_layers"]
        spans = [range(first, min(first + size, total)) for first in range(0, total, size)]
        taught = [number for number, layers in enumerate(spans) if self.skeleton.mixers(layers)]
        self.spans = spans[: taught[-1] + 1]  # nothing is learned after the last of them
        rows, steps, batch = self.schedule.rows, self.schedule.steps, self.schedule.batch
        wanted = (
            range(len(rows)) if steps * batch >= len(rows) else sorted({i for s in range(steps) for i in self.schedule.indices(s)})
        )
        self.rows = list(wanted)
        keys = dict.fromkeys(key for i in self.rows for key in row_keys(rows.ids[[i]], rows.positions[[i]]))
        self.slots = {key: slot for slot, key in enumerate(keys)}

    def begin(self, streaming: Streaming, resume: bool) -> None:
        """Say what goes to disk and refuse what does not fit; note what is begun, or hold it against what was."""
        begun = self.run / BEGUN
        if resume and begun.exists():
            check_same(json.loads(begun.read_text(encoding="utf-8")), self.facts)
        model, existing = self.skeleton.model, sum(path.stat().st_size for path in self.run.rglob("*") if path.is_file())
        row = self.schedule.rows.ids.shape[1] * model.config.get_text_config().hidden_size * model.dtype.itemsize
        needed = min(len(self.spans), 2) * len(self.slots) * row
        largest = max(sum(p.numel() * 4 for p in self.skeleton.mixers(layers).values()) for layers in self.spans)
        total = needed + self.skeleton.bytes + largest * STATES * (self.saving.keep + 1)
        free = shutil.disk_usage(self.run).free + existing
        limit = FREE_SHARE * free if streaming.cache is None else streaming.cache * 1e9
        told = {"layers": len(self.skeleton.layers), "at_a_time": self.facts["stream_layers"], "layer_inputs": gb(needed)}
        self.progress("stream layers", 0, 1, **told, disk=gb(total), free=gb(free))
        if needed > limit:
            tokens = int(limit / needed * len(self.slots)) * self.schedule.rows.ids.shape[1]
            what = f"the layer inputs take {gb(needed)}, more than the {gb(limit)} that they may"
            raise ResourceError(what, str(self.run), f"--tokens {tokens} or fewer, or --stream-cache {needed / 1e9:.3g}")
        if total > free:
            raise ResourceError(f"need {gb(total)}, {gb(free)} free", str(self.run), "fewer --tokens, or another disk with -o")
        begun.write_text(json.dumps(self.facts), encoding="utf-8")

    def done(self, number: int) -> Path:
        return self.run / f"done-{number:03d}"

    def inputs(self, number: int) -> LayerInputs:
        return LayerInputs(self.run / f"inputs-{number:03d}.bin", self.slots)

    def train(self, number: int, layers: range, resume: bool) -> dict[str, Any]:
        """One block, unless it is done: its mixers, and what the next block reads. Returns its report."""
        done, work, before = self.done(number), self.run / f"block-{number:03d}", self.inputs(number)
        if not (resume and is_whole(done)):
            after = self.inputs(number + 1) if number + 1 < len(self.spans) else None
            if number == 0 and before.missing():
                self._embed(before)
            work.mkdir(exist_ok=True)
            with self.skeleton.block(layers, bool(before.facts["in_tuple"])):
                mixers = self.skeleton.mixers(layers)
                task = BlockTransfer(self.skeleton, self.stage, before, after)
                report = self._teach(number, layers, work, task, mixers, resume) if mixers else self._pass(number, task)
                if after is not None:
                    after.sync()
                write_done(done, report, {name: p.data for name, p in mixers.items()}, work)
            if after is not None:
                after.close()
        keep_skipped(work, self.run)
        shutil.rmtree(work, ignore_errors=True)
        before.remove()
        read_from(self.skeleton.shards, done / PARAMETERS)
        return dict(json.loads((done / REPORT).read_text(encoding="utf-8")))

    def _embed(self, before: LayerInputs) -> None:
        """What the first layer reads: a pass over the embedding alone."""
        rows = self.schedule.rows
        with torch.no_grad(), mode(self.skeleton.model, "observe"), self.skeleton.embedding():
            for i in self.rows:
                ids, positions = (x[[i]] for x in (rows.ids, rows.positions))
                left = self.skeleton.read(positions.to(self.skeleton.device), ids=ids.to(self.skeleton.device))
                before.write(row_keys(ids, positions), left.hidden)
        before.sync()

    def _teach(
        self, number: int, layers: range, work: Path, task: BlockTransfer, mixers: dict[str, nn.Parameter], resume: bool
    ) -> dict[str, Any]:
        for p in mixers.values():
            p.requires_grad_(True)

        def parameters() -> dict[str, Tensor]:
            if task.after is not None:
                task.after.sync()  # a saved state says that the rows of its steps are there
            return {name: p.data for name, p in mixers.items()}

        def restore(tensors: dict[str, Tensor]) -> None:
            for name, x in tensors.items():
                mixers[name].data.copy_(x)

        trainer = Trainer(
            self.accelerator, work, 0, self.stage.kind, groups=[{"params": list(mixers.values()), "lr": self.rate}],
            parameters=parameters, restore=restore, named=mixers, task=task, schedule=self.schedule, facts=self.facts, done=[],
            progress=self._told(number, f"{layers.start}-{layers.stop - 1}"), reduce_gradients=True, saving=self.saving,
            before=number * self.schedule.steps,
        )  # fmt: skip
        return {**trainer.train(resume), "layers": len(task.by_layer)}

    def _pass(self, number: int, task: BlockTransfer) -> dict[str, Any]:
        """Layers without anything to learn: what the next block reads, in batches such as training would have."""
        assert task.after is not None
        rows, progress = self.schedule.rows, self._told(number, "nothing to learn")
        with torch.no_grad(), mode(self.skeleton.model, "observe"):
            for step in range(self.schedule.steps):
                index = self.schedule.indices(step)
                task.read(*(x[index].to(self.skeleton.device) for x in (rows.ids, rows.positions)))
                progress(f"distill: {self.stage.kind}", step + 1, self.schedule.steps)
                if not task.after.missing():
                    break
        return {"layers": 0}

    def _told(self, number: int, layers: str) -> Progress:
        """Progress over all blocks."""

        def told(task: str, done: float, total: float, **facts: object) -> None:
            self.progress(task, number * total + done, len(self.spans) * total, layers=layers, **facts)

        return told


def write_done(done: Path, report: Mapping[str, Any], tensors: Mapping[str, Tensor], work: Path) -> None:
    """What is left of a block, whole or not at all."""
    (work / METRICS).touch()
    with staged(done, overwrite=True) as folder:
        save_file({name: x.contiguous() for name, x in tensors.items()}, folder / PARAMETERS)
        shutil.copyfile(work / METRICS, folder / METRICS)
        (folder / REPORT).write_text(json.dumps(report), encoding="utf-8")


def is_whole(done: Path) -> bool:
    try:
        verify(done)
    except IntegrityError:
        return False
    return True


def keep_skipped(work: Path, run: Path) -> None:
    """Rows whose loss was not finite outlive their block: the same step has the same rows in each."""
    for path in (work / SKIPPED).glob("*"):
        (run / SKIPPED).mkdir(exist_ok=True)
        path.replace(run / SKIPPED / path.name)


def read_from(shards: Shards, path: Path) -> None:
    """Let the tensors of a file be read from there from now on."""
    shards.files.index.update({name: {"safetensors_file": str(path)} for name in safetensors_header(path)})


def joined(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The report that all layers at once would have: losses are means over layers, times and skipped steps add up."""
    layers = sum(one["layers"] for one in reports)
    found: dict[str, Any] = {"steps": max(one["steps"] for one in reports)}
    found |= {key: sum(one[key] for one in reports) for key in ("skipped", "seconds")}
    for key in ("first_loss", "last_loss"):
        found[key] = mean([(one[key], one["layers"]) for one in reports], layers)
    return found


def mean(losses: list[tuple[float | None, int]], layers: int) -> float | None:
    """Of blocks' means, with so many layers each; None if one of them is unknown."""
    known = [loss * count for loss, count in losses if loss is not None]
    return sum(known) / layers if len(known) == len(losses) else None


def merge_metrics(run: Path, blocks: list[Path]) -> None:
    """One line a step in the run's metrics, as if all layers had learned at once."""
    steps: dict[int, list[dict[str, Any]]] = {}
    for block in blocks:
        for text in (block / METRICS).read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            steps.setdefault(line["step"], []).append(line)
    (run / METRICS).unlink(missing_ok=True)
    for step in sorted(steps):
        append(run, merged(steps[step]))


def merged(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """A step's lines of all blocks as one."""
    layers = {i: loss for line in lines for i, loss in line["layers"].items()}
    found = {**lines[0], "layers": layers, "loss": mean([(line["loss"], len(line["layers"])) for line in lines], len(layers))}
    found |= {key: sum(line[key] for line in lines) for key in ("skipped", "seconds")}
    found |= {"rate": min(line["rate"] for line in lines), "memory": max(line["memory"] for line in lines)}
    return {**found, "tokens_per_second": round(found["tokens"] / max(found["seconds"], 1e-9))}


def gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
