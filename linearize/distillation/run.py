"""Distillation of a converted checkpoint: its method's stages, then one merged checkpoint that loads as any model."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch import distributed as dist
from transformers import AutoTokenizer

from linearize import text
from linearize.checkpoint import check_target
from linearize.conversion.saving import save
from linearize.distillation import lora, sharding
from linearize.distillation.data import Rows, training_documents
from linearize.distillation.guard import SKIPPED
from linearize.distillation.loop import BY_TIME, Saving, Schedule, Task, Trainer, make_accelerator
from linearize.distillation.losses import check_losses
from linearize.distillation.sequence_parallel import alone, check_sharing, sharing
from linearize.distillation.stages import AttentionTransfer, LogitDistillation, learnt_parameters, lora_parameters, mixer_parameters
from linearize.distillation.state import check_same, latest_state
from linearize.distillation.streaming import Streaming, check_begun, check_streaming, stream_attention
from linearize.distillation.streaming_model import Skeleton
from linearize.distillation.teacher_text import teacher_documents, wanted_tokens
from linearize.documents import TEACHER, chat_of
from linearize.errors import InputError, UnsupportedError, UsageError
from linearize.loading import ADAPTER, check_adapter_apart
from linearize.methods.base import ATTENTION, KINDS, LONG, LONG_STAGE, Stage
from linearize.modeling.plans import is_causal, plan_layers
from linearize.opening import check, need_decoder
from linearize.progress import Progress, silent
from linearize.recipe import Recipe, check_layout, recipe_of

if TYPE_CHECKING:
    from accelerate import Accelerator

ALL = "all"
UNFITTED = "the mixers were never fitted to their layers: stage attention first costs far fewer tokens"
RowsOf = Callable[[Stage], text.Packed]


@dataclass(frozen=True)
class Distilled:
    """The checkpoint written, and what each stage trained, on how many tokens, from which loss to which.

    `sampled` is the folder of the text that the teacher gave, where it was asked for some.
    """

    path: Path
    stages: list[dict[str, Any]]
    is_main: bool = True
    causal: bool = True
    sampled: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        found = {"path": str(self.path), "stages": self.stages}
        return found if self.sampled is None else {**found, "sampled": str(self.sampled)}


def distill(
    directory: Path,
    *,
    data: str | Sequence[str] | None = None,
    recall: float | None = None,
    held_out: int | None = None,
    tokens: int | None = None,
    stage: str = "all",
    recipe: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
    output: Path | None = None,
    resume: bool = False,
    seed: int | None = None,
    sequence: int | None = None,
    batch: int | None = None,
    device: str = "auto",
    save_every: int | None = None,
    keep: int = 2,
    merge: bool = True,
    report_to: Sequence[str] = (),
    shard: bool = False,
    precision: str | None = None,
    gradient_checkpointing: bool = False,
    sequence_parallel: bool = False,
    streaming: Streaming | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Distilled:
    """Train the mixers (stage attention), then LoRA (lora, long), and write the checkpoint to `output`.

    What is learnt from what is the `recipe` (as `recipe.read` gives it), with `sets` such as stages.lora.rank=4 over it; without
    one it is the method's own. Over both go `data` (one source or several; `teacher` is text that the teacher is sampled for,
    kept in `output`.teacher), the share `recall` of synthetic rows in which something is hidden and asked for at the end (a
    decoder's task), the percentage `held_out` of documents that stay unseen, the budget `tokens` of each stage, the kind of
    `stage`, and `batch` rows of `sequence` tokens a step and process.
    The state is saved every `save_every` steps (default: every five minutes), the last `keep` of them stay until the end;
    `resume` goes on from the last one where there is one. Without `merge` the adapter stays apart, in `output`/adapter.
    `streaming` runs stage attention a few layers at a time, for a model that does not fit in memory.
    `report_to` names trackers of accelerate, such as tensorboard, wandb, trackio, which may write beside the
    output; metrics.jsonl is written always.
    `shard` spreads the frozen weights over the processes, gathered in `precision` (bfloat16; default: as they are stored).
    `sequence_parallel` lets all processes share each row, in equal parts, instead of having rows of their own.
    """
    config = check(directory)
    plan, tokenizer = config["linearize"], AutoTokenizer.from_pretrained(directory)
    sources = (data,) if isinstance(data, str) else data
    told = {"data": sources, "recall": recall, "held_out": held_out, "seed": seed, "sequence": sequence, "batch": batch}
    made = recipe_of(recipe, sets, plan["method"])
    check_layout(made, plan)
    made = replace(made, **{key: x for key, x in told.items() if x is not None})  # type: ignore[arg-type]
    chosen = stages_for(made, stage, tokens)
    if sequence is not None and stage != ALL:  # it is of the stage that is named, whatever that has of its own
        chosen = [replace(one, sequence=0) for one in chosen]
    check_losses(chosen, plan_layers(plan))
    if made.recall:
        need_decoder(plan, str(directory), "recall rows are")
    sampled, said = wanted_tokens(made.data, chosen), None
    if sampled:
        need_decoder(plan, str(directory), "--data teacher is")
    target = output or directory.with_name(f"{directory.resolve().name}-distilled")
    check_target(target, overwrite, directory.resolve())
    check_adapter_apart(directory)
    training = training_documents(made.data, chat_of(tokenizer), made.held_out)
    run = target.with_name(f"{target.name}.run")
    accelerator = make_accelerator(device, report_to, target.with_name(f"{target.name}.logs"))
    rows = Rows(made, plan, tokenizer, text.tokenise(tokenizer, training))
    check_encoder(config, chosen, rows.mask_token, str(directory))
    spread: dict[str, Any] = {"shard": shard, "precision": precision, "gradient_checkpointing": gradient_checkpointing}
    skeleton = None
    if streaming is not None:
        refused = {**spread, "data teacher": sampled, "sequence_parallel": sequence_parallel}
        check_streaming(chosen, accelerator.num_processes, refused)
        skeleton = Skeleton(directory, accelerator.device, target.with_name(f"{target.name}.weights"))
    model = skeleton.model if skeleton else sharding.opened(directory, accelerator.device, accelerator.num_processes, **spread)
    facts = {"data": list(made.data), "recall": made.recall, "seed": made.seed, "sequence": made.sequence, "batch": made.batch}
    facts |= {"held_out": made.held_out, "processes": accelerator.num_processes, "shard": shard, "precision": precision}
    facts["sequence_parallel"] = sequence_parallel
    if sequence_parallel:
        check_sharing(model, accelerator.num_processes, {one.kind: rows.length(one) for one in chosen})
    teller = progress if accelerator.is_main_process else silent
    for one in chosen:
        lora.check_targets(one, model)
    check_begun(run, streaming, resume, overwrite)
    check_run(run, resume, overwrite, facts)
    if sampled:
        said = target.with_name(f"{target.name}.{TEACHER}")
        length = max(rows.length(one) for one in chosen) - 1  # and the token that ends it
        rows.add(teacher_documents(
            accelerator, model, tokenizer, directory, said, tokens=sampled, length=length, seed=made.seed, progress=teller
        ))  # fmt: skip
    for chosen_stage in chosen:
        rows(chosen_stage)
    begin_run(accelerator, run, resume)
    if report_to:
        shown = {key: x for key, x in facts.items() if isinstance(x, str | int | float)}
        accelerator.init_trackers(target.name, {"method": plan["method"], **shown})
    how: Any = {"batch": made.batch, "seed": made.seed, "resume": resume, "saving": Saving(save_every, keep), "progress": teller}
    if skeleton is not None and streaming is not None:
        found = stream_stage(accelerator, skeleton, chosen[0], rows(chosen[0]), run, facts, streaming=streaming, **how)
    else:
        found = train_stages(accelerator, model, chosen, rows, run, facts, sequence_parallel=sequence_parallel, **how)
    if shard and accelerator.is_main_process:
        found.model = sharding.unsharded(found.model, directory, accelerator.device)
    finish(accelerator, found.model, tokenizer, found.stages, facts, target, run, overwrite, merge)
    if skeleton is not None:
        skeleton.close()
    if report_to:
        accelerator.end_training()
    return Distilled(target, found.stages, accelerator.is_main_process, is_causal(plan), said)


@dataclass
class Trained:
    model: Any
    stages: list[dict[str, Any]]


def stages_for(recipe: Recipe, wanted: str = ALL, tokens: int | None = None) -> list[Stage]:
    """The recipe's stages of that kind, with the budget that was asked for."""
    if wanted not in (ALL, *KINDS):
        raise UsageError(f"unknown stage '{wanted}'", "--stage", f"one of: {', '.join((*KINDS, ALL))}")
    own = [s for s in recipe.stages if wanted in (ALL, s.kind)]
    if not own and wanted == LONG:
        own = [LONG_STAGE]
    if not own:
        kinds = ", ".join(s.kind for s in recipe.stages)
        raise UsageError(f"method {recipe.method} has no stage '{wanted}'", "--stage", f"its stages: {kinds}")
    return [replace(s, tokens=tokens) if tokens else s for s in own]


def stream_stage(
    accelerator: Accelerator, skeleton: Skeleton, stage: Stage, rows: text.Packed, run: Path, facts: dict[str, Any], **how: Any
) -> Trained:
    """Stage attention, a few layers at a time."""
    listed = {**facts, "stages": [_listed(stage)]}
    reports = stream_attention(accelerator, skeleton, stage, rows, run, listed, **how)
    return Trained(skeleton.whole(), reports)


def check_encoder(config: Mapping[str, Any], stages: list[Stage], mask_token: int | None, where: str) -> None:
    """UnsupportedError where an encoder is to learn from logits, but predicts no hidden tokens or has no token to hide others."""
    if is_causal(config["linearize"]) or all(stage.kind == ATTENTION for stage in stages):
        return
    if any(stage.kind == LONG for stage in stages):
        raise UnsupportedError("stage long predicts the next token, which an encoder does not", where, "--stage attention, or lora")
    if not config["architectures"][0].endswith("ForMaskedLM"):
        fix = "--stage attention, then fine-tune it on its task with transformers' Trainer"
        raise UnsupportedError(f"stage lora predicts hidden tokens, which {config['architectures'][0]} does not", where, fix)
    if mask_token is None:
        raise UnsupportedError("stage lora hides tokens, and this tokenizer has no mask token", where, "--stage attention")


def check_run(run: Path, resume: bool, overwrite: bool, facts: Mapping[str, Any]) -> None:
    """InputError if a run that was interrupted would be lost, or would not go on as it began."""
    saved = latest_state(run)
    if saved is not None and resume:
        check_same(saved[0], facts)
    elif saved is not None and not overwrite:
        begun, fix = saved[0], "--resume auto goes on with it; --overwrite begins anew"
        raise InputError(f"a run was interrupted here (stage {begun['stage'] + 1}, step {begun['step']})", str(run), fix)


def begin_run(accelerator: Accelerator, run: Path, resume: bool) -> None:
    """The folder that holds a run's state and metrics until its checkpoint is written."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if not resume:
            shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()


def train_stages(
    accelerator: Accelerator, model: Any, stages: list[Stage], rows: RowsOf, run: Path, facts: dict[str, Any], *,
    batch: int = 1, seed: int = 0, resume: bool = False, saving: Saving = BY_TIME, deadline: float | None = None,
    sequence_parallel: bool = False, progress: Progress = silent,
) -> Trained:  # fmt: skip
    """Run the stages in order on one model. `deadline` (time.monotonic) ends the last stage early."""
    done: list[dict[str, Any]] = []
    facts = {**facts, "stages": [_listed(stage) for stage in stages]}
    saved = latest_state(run) if resume else None
    at = int(saved[0]["stage"]) if saved else 0
    for number, stage in enumerate(stages):
        if number < at:
            _restore_stage(model, saved, done)
            continue
        model, report = train_stage(
            accelerator, model, stage, number, rows(stage), run, facts,
            batch=batch, seed=seed, resume=resume and number == at, saving=saving, deadline=deadline, done=list(done),
            sequence_parallel=sequence_parallel, progress=progress,
        )  # fmt: skip
        done.append(report)
    return Trained(model, done)


def _restore_stage(model: Any, saved: Any, done: list[dict[str, Any]]) -> None:
    """A stage that was complete when the run stopped: its parameters are part of the saved state of the next one."""
    load_parameters(model, {name: x for name, x in saved[1].items() if ".linearize." in name})
    done.extend(saved[0].get("done", [])[len(done) : len(done) + 1])


def load_parameters(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    own = dict(model.named_parameters())
    for name, x in tensors.items():
        own[name].data.copy_(x)


def train_stage(
    accelerator: Accelerator, model: Any, stage: Stage, number: int, rows: text.Packed, run: Path, facts: dict[str, Any], *,
    batch: int, seed: int, resume: bool, saving: Saving, deadline: float | None, done: list[dict[str, Any]],
    sequence_parallel: bool, progress: Progress,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    """One stage; returns the model (wrapped by peft after a stage with LoRA) and its report."""
    model.requires_grad_(False)
    fitted = any(one["kind"] == ATTENTION for one in [*model.config.linearize["stages"], *done])
    note = "" if stage.kind == ATTENTION or fitted or not mixer_parameters(model) else UNFITTED
    if stage.kind == ATTENTION:
        trained = {"mixers": learnt_parameters(model)}
    else:
        model = model if hasattr(model, "merge_and_unload") else lora.add_adapter(model, stage, seed)
        trained = {"lora": lora_parameters(model)}
        if stage.mixer_lr:
            trained["mixers"] = learnt_parameters(model)
    rates = {"mixers": stage.mixer_lr or stage.lr, "lora": stage.lr}
    trained = {group: params for group, params in trained.items() if params}
    run_facts = {key: x for key, x in facts.items() if key != "stages"}
    report: dict[str, Any] = {**_listed(stage), **run_facts, "trained": [], "merged": stage.kind != ATTENTION}
    report |= {"sequence": rows.ids.shape[1]} | ({"note": note} if note else {})
    for group, params in trained.items():
        count = sum(p.numel() for p in params.values())
        dtype = str(next(iter(params.values())).dtype).removeprefix("torch.")
        report["trained"].append({"group": group, "parameters": count, "dtype": dtype, "lr": rates[group]})
        for p in params.values():
            p.requires_grad_(True)
    if not trained:
        return model, {**report, "tokens": 0, "steps": 0, "note": "the method has no parameter to transfer"}
    progress(f"distill: {stage.kind}", 0, 1, trained=report["trained"], loss=stage.loss, **({"note": note} if note else {}))
    every = {name: p for params in trained.values() for name, p in params.items()} | mixer_parameters(model)
    sharded = sharding.is_sharded(model)
    trainer = Trainer(
        accelerator, run, number, stage.kind,
        groups=[{"params": list(params.values()), "lr": rates[group]} for group, params in trained.items()],
        parameters=lambda: {name.removeprefix("base_model.model."): p.data for name, p in every.items()},
        restore=lambda tensors: load_parameters(model, {_wrapped(name, every): x for name, x in tensors.items()}),
        before=sum(int(report["steps"]) for report in done), named=every,
        task=_task(accelerator, model, stage, rows.mask_token, sequence_parallel),
        schedule=_schedule(accelerator, rows, stage, seed, batch, sequence_parallel),
        facts=facts, done=done, progress=progress, saving=saving, deadline=deadline, sharded=sharded,
        reduce_gradients=stage.kind == ATTENTION or sharded or sequence_parallel,
    )  # fmt: skip
    result = trainer.train(resume)
    result["tokens"] = result["steps"] * batch * trainer.schedule.processes * rows.ids.shape[1]
    return model, {**report, **result}


def _wrapped(name: str, every: Mapping[str, nn.Parameter]) -> str:
    return name if name in every else f"base_model.model.{name}"


def _schedule(accelerator: Accelerator, rows: text.Packed, stage: Stage, seed: int, batch: int, shared: bool) -> Schedule:
    processes, rank = (1, 0) if shared else (accelerator.num_processes, accelerator.process_index)
    a_step = batch * processes * rows.ids.shape[1]
    return Schedule(rows, max(round(stage.tokens / a_step), 1), seed, processes, rank, batch)


def _task(accelerator: Accelerator, model: Any, stage: Stage, mask_token: int | None, shared: bool) -> Task:
    reading = functools.partial(sharing, dist.group.WORLD) if shared and dist.group.WORLD is not None else alone
    if stage.kind == ATTENTION:
        return AttentionTransfer(model, stage, reading)
    # in DDP's backward pass its own reduction would run among the exchanges of shared rows
    data_parallel = accelerator.num_processes > 1 and not sharding.is_sharded(model) and not shared
    wrapped = accelerator.prepare_model(model) if data_parallel else model
    return LogitDistillation(accelerator, wrapped, model, stage, mask_token, reading)


def _listed(stage: Stage) -> dict[str, Any]:
    """A stage as JSON has it."""
    return {key: list(x) if isinstance(x, tuple) else x for key, x in asdict(stage).items()}


def finish(
    accelerator: Accelerator, model: Any, tokenizer: Any, reports: list[dict[str, Any]], facts: Mapping[str, Any],
    target: Path, run: Path, overwrite: bool, merge: bool = True,
) -> None:  # fmt: skip
    """Merge the adapter or set it apart, record the stages in the plan, write the checkpoint, only then remove the run's state."""
    if accelerator.is_main_process:
        files = [run / "metrics.jsonl"]
        if hasattr(model, "merge_and_unload") and merge:
            model = lora.merge(model)
        elif hasattr(model, "merge_and_unload"):
            files.append(run / ADAPTER)
            lora.save_adapter(model, run / ADAPTER, target)
            model = lora.without(model)
            reports = [{**report, "merged": False} for report in reports]
        model.config.linearize = {**model.config.linearize, "stages": [*model.config.linearize["stages"], *reports]}
        recipe = {"stages": reports, **facts, "written": time.strftime("%Y-%m-%d")}
        save(model, tokenizer, target, overwrite=overwrite, recipe=recipe, files=files)
        end_run(run)
    accelerator.wait_for_everyone()


def end_run(run: Path) -> None:
    """The checkpoint holds all that the run's folder did; rows whose loss was not finite stay to be looked at."""
    for path in run.iterdir():
        if path.name != SKIPPED:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not any(run.iterdir()):
        run.rmdir()


__all__ = ["Distilled", "distill", "train_stages"]
