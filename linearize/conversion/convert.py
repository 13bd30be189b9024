"""Conversion: the original weights, mixers added where the plan says, started from a few sequences, saved as a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from linearize.checkpoint import check_space, check_target
from linearize.conversion.budget import FEWEST_SLOTS, PLAIN, STORED, Frontier, Layout
from linearize.conversion.budget_costs import Rows, measure_costs
from linearize.conversion.calibration import Scores, fit_scores, start_mixers
from linearize.conversion.calibration_text import SHORTEST, CalibrationText, calibration_ids, own_text
from linearize.conversion.detection import auto_class
from linearize.conversion.offload import ON_DISK, Shards, offload, release, scratch, spill
from linearize.conversion.plan import Plan, plan_for
from linearize.conversion.ranking import dearest, swap_costs
from linearize.conversion.saving import save
from linearize.conversion.sources import Source, resolve
from linearize.conversion.streaming import CALIBRATION_ROWS
from linearize.devices import pick_device, pick_dtype
from linearize.documents import documents
from linearize.errors import HubError, InputError, IntegrityError, UnsupportedError, UsageError
from linearize.methods import DEFAULT
from linearize.methods.base import STARTS
from linearize.methods.layout import check_options
from linearize.modeling.modeling_linearized import install, linearized_class
from linearize.progress import Progress, silent
from linearize.text import HELD_OUT_PERCENT

GENERATION_KEYS = {"pad_token_id", "bos_token_id", "eos_token_id"}


@dataclass(frozen=True)
class Converted:
    """Where the checkpoint is, what was planned, and each layer's relative error after its start."""

    path: Path
    plan: Plan
    errors: list[float]
    swap_costs: Mapping[int, float]
    frontier: Sequence[Layout] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "plan": self.plan.to_dict(),
            "relative_error": self.errors,
            "swap_costs": dict(self.swap_costs),
            "frontier": [layout.to_dict() for layout in self.frontier],
        }


def load_source(
    source: Source, dtype: torch.dtype, trust_remote_code: bool = False, offload_to: Path | None = None
) -> tuple[nn.Module, Any]:
    """The original model and its tokenizer.

    With `offload_to` the weights stay in the source's files as they are stored (`release` lets them be read in another dtype);
    those that transformers fuses on loading go to that folder.
    """
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if source.format == "gguf":
        assert source.path is not None
        folder, file = str(source.path.parent), source.path.name
        # without dequantize=True the model would stay marked as quantized and refuse to save
        options["quantization_config"] = GgufConfig(gguf_file=file, dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, **options)
        return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)
    where = str(source.path) if source.path is not None else source.id
    if offload_to is not None:
        options |= {"device_map": dict(ON_DISK), "offload_folder": str(offload_to), "dtype": "auto"}
    try:
        auto = getattr(transformers, auto_class(source.config, source.id))
        model = auto.from_pretrained(where, revision=source.revision, use_safetensors=True, **options)
        tokenizer = _tokenizer(where, source.revision)
    except OSError as error:
        if source.format != "hub":
            raise IntegrityError("the model cannot be loaded", where, str(error).splitlines()[0]) from error
        raise HubError("the weights cannot be fetched", where, "check the network, or point at a local copy") from error
    return model, tokenizer


def _tokenizer(where: str, revision: str | None) -> Any:
    try:
        return AutoTokenizer.from_pretrained(where, revision=revision)
    except ValueError as error:
        fix = "put its files (tokenizer.json, tokenizer_config.json) beside the weights"
        raise InputError("no tokenizer can be read", where, fix) from error


def attach(model: nn.Module, plan: Mapping[str, Any], device: torch.device | None = None) -> Any:
    """The linearized model around the given one's own modules: no weight is copied. The given model must not be used afterwards.

    Mixers are built on `device`, by default where each layer is; on 'meta' they are for `start_mixers` to build.
    """
    base: Any = model.config
    made = linearized_class(type(model).__name__)
    values = {key: value for key, value in base.to_dict().items() if key not in ("model_type", "quantization_config", "auto_map")}
    config = made.config_class(**values, linearize=dict(plan))
    config.name_or_path = ""  # never a path of this machine
    config.dtype = base.dtype
    with torch.device("meta"):
        new = made(config)
    for name, child in model.named_children():
        setattr(new, name, child)
    attention = re.compile(re.sub(r"\d+", r"\\d+", re.escape(plan["layers"][0]["module"])))
    for name, module in new.named_modules():  # attention keeps the base's: kept layers and teachers stay as they were
        if getattr(module, "config", None) is base and not attention.fullmatch(name):
            module.config = config
    new.generation_config = getattr(model, "generation_config", None)
    base._attn_implementation_internal = base._attn_implementation_internal or "sdpa"
    install(new, device)
    return new.train(model.training)


def convert_model(
    model: nn.Module,
    *,
    method: str = DEFAULT,
    options: Mapping[str, Any] | None = None,
    layers: str | None = None,
    calibration: Tensor | None = None,
    start: str = "calibrated",
    seed: int = 0,
    source: Source | None = None,
    progress: Progress = silent,
) -> Any:
    """Convert a transformers model in memory. `calibration` (B, T) are token ids; without it the model's own text serves.

    An encoder writes no text of its own: random tokens stand for it.
    Returns a model that generates (a CausalLM), saves and trains as any other; the given one lends it its modules.
    """
    values = model.config.to_dict()  # type: ignore[union-attr, operator]
    if values.get("linearize"):
        raise UnsupportedError("this model is already linearized", type(model).__name__, "pass the original model")
    auto_class({**values, "architectures": [type(model).__name__]}, type(model).__name__)
    known = source or Source(type(model).__name__, getattr(model, "name_or_path", "") or "in memory", "memory", None, values)
    plan = plan_for(known, method, layers, options or {}, start)
    if plan.keeps:
        raise InputError(f"'{layers}' needs the model as it is beside its conversion", "layers", "linearize convert MODEL")
    new, _ = convert_in_memory(model, plan, calibration, seed, progress)
    return new


def convert_in_memory(
    model: nn.Module, plan: Plan, ids: Tensor | None, seed: int, progress: Progress, scores: Scores | None = None
) -> tuple[Any, list[float]]:
    """Attach the plan's mixers to the model and start them on ids (B, T), with slot scores of their own unless they are given;
    returns it and each layer's relative error."""
    training = model.training
    if ids is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            ids = own_text(model.eval())
    ids = ids[:, : plan.max_positions]
    new = attach(model.eval(), plan.config_field(), torch.device("meta"))
    device = next(model.parameters()).device
    errors = start_mixers(new, plan, ids, seed, device, progress, scores=scores)
    return new.train(training), errors


def convert_on_disk(
    model: nn.Module,
    shards: Shards,
    plan: Plan,
    ids: Tensor,
    seed: int,
    progress: Progress,
    device: torch.device,
    scores: Scores | None = None,
) -> tuple[Any, list[float]]:
    """`convert_in_memory` for a model whose weights are in `shards`, where started mixers go too."""
    new = attach(model.eval(), plan.config_field(), torch.device("meta"))
    offload(new, shards, device)
    new.hf_device_map = dict(ON_DISK)  # so save_pretrained knows that it must read what it writes

    def after(attention: Any) -> None:
        module = plan.architecture.attention.format(attention.linearize_index)
        spill(attention.linearize, shards, device, f"{module}.linearize")

    errors = start_mixers(new, plan, ids, seed, device, progress, after, scores)
    new.tie_weights()  # hooks part what was one parameter
    total, done = len(dict(new.named_parameters())), count(1)
    shards.told = lambda: progress("save", next(done), total)
    return new, errors


def convert(
    model: str,
    *,
    method: str = DEFAULT,
    output: Path | None = None,
    layers: str | None = None,
    options: Mapping[str, Any] | None = None,
    state_budget: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    calibration: Path | None = None,
    calibration_length: int | None = None,
    held_out: int | None = None,
    start: str = "calibrated",
    overwrite: bool = False,
    progress: Progress = silent,
) -> Converted:
    """Convert MODEL into a checkpoint folder (default: its name and the method's). Nothing is overwritten unasked.

    `held_out` is the percentage of the calibration's documents, by hash, that it does not see, `calibration_length` the tokens of
    its rows where slots go by a learnt score, by default 4,096. With `state_budget`, bytes of one sequence's state, method and
    options are found instead of given: see `measure_frontier`.
    """
    check_options(method, options, start)
    if start not in STARTS:
        raise UsageError(f"unknown start '{start}'", "--start", f"one of: {', '.join(STARTS)}")
    if calibration_length and calibration_length < SHORTEST:
        fix = f"--calibration-length {SHORTEST} or more"
        raise UsageError(f"rows of {calibration_length} tokens have no room for what is asked", "--calibration-length", fix)
    read = CalibrationText(calibration, held_out or HELD_OUT_PERCENT, calibration_length)
    if calibration is not None:
        documents(str(calibration))  # a bad file is said before the model is loaded
    if state_budget is not None and (method != DEFAULT or options):
        raise UsageError("a state budget finds method and options", "--state-budget", "leave out --method, --set and --recipe")
    source = resolve(model, revision, trust_remote_code)
    plan = plan_for(source, method, layers, options or {}, start)  # a model that cannot be converted is told before anything else
    if calibration_length and state_budget is None and not any(mixer.scores_learned for mixer in plan.mixers):
        fix = "leave it out, or --set slot_score=learned, or --state-budget SIZE"
        raise UsageError("no layer has slots that go by a learnt score, which long rows are for", "--calibration-length", fix)
    target = output or Path(f"{source.name}-{file_name(method) if state_budget is None else f'{state_budget // 1000}KB'}")
    check_target(target, overwrite, source.path)
    on = pick_device(device)
    as_stored, costs, shown = pick_dtype(dtype, source.stored_dtype, on), dict[int, float](), list[Layout]()
    scores: Scores | None = None
    if state_budget is not None:
        frontier, scores = measure_frontier(source, layers, as_stored, on, read, seed, trust_remote_code, progress)
        found, shown = frontier.within(state_budget), frontier.shown(state_budget)
        plan = plan_for(source, found.method, layers, found.options, start)
    if plan.keeps:
        costs = measure_swaps(plan, as_stored, on, read, seed, trust_remote_code, progress)
        plan = plan.without(dearest(costs, plan.keeps))
    with scratch(target) if plan.route.streamed else nullcontext() as folder:
        progress("load", 0, 1)
        loaded, tokenizer = load_source(source, as_stored, trust_remote_code, folder)
        shards = None if folder is None else release(loaded, folder, as_stored)
        progress("load", 1, 1)
        check_space(target, sum(p.numel() * p.element_size() for p in loaded.parameters()) * 2)
        ids = calibration_ids(tokenizer, read, plan)
        if shards is None:
            new, errors = convert_in_memory(loaded.to(on).eval(), plan, ids, seed, progress, scores)
        else:
            new, errors = convert_on_disk(loaded, shards, plan, ids, seed, progress, on, scores)
        progress("save", 0, 1)
        save(new, tokenizer, target, overwrite=overwrite, recipe={"swap_costs": costs} if costs else None)
        progress("save", 1, 1)
    return Converted(target, plan, errors, costs, shown)


def measure_frontier(
    source: Source, layers: str | None, dtype: torch.dtype, device: torch.device, read: CalibrationText, seed: int, trusted: bool,
    progress: Progress,
) -> tuple[Frontier, Scores]:  # fmt: skip
    """The best layouts of any state size, out of `budget.candidates`, by what each costs each layer on the calibration text; and
    the slot scores that were fitted for all of them.

    The whole model is in memory. UnsupportedError for an encoder, which keeps no state.
    """
    plan = plan_for(source, DEFAULT, layers, {**PLAIN, **STORED, "slots": FEWEST_SLOTS}, STARTS[0])
    if not plan.architecture.causal:
        raise UnsupportedError("an encoder keeps no state from call to call", source.id, "leave out --state-budget")
    if plan.keeps:
        raise UsageError(
            "the layers to keep cannot be measured together with a state budget", "--layers", f"--layers keep:{plan.keeps}"
        )
    progress("load", 0, 1)
    loaded, tokenizer = load_source(source, dtype, trusted)
    progress("load", 1, 1)
    ids = calibration_ids(tokenizer, read, plan)
    model = attach(loaded.to(device).eval(), plan.config_field())
    rows = Rows.of(ids)
    scores = fit_scores(model, rows.ids[rows.fitted], device, progress)
    return Frontier(measure_costs(model, plan, rows, scores, seed, progress)), scores


def measure_swaps(
    plan: Plan,
    dtype: torch.dtype,
    device: torch.device,
    read: CalibrationText,
    seed: int,
    trusted: bool,
    progress: Progress,
) -> dict[int, float]:
    """What each layer's swap costs, on the whole model in memory: KL in nats a token, by layer."""
    progress("load", 0, 1)
    loaded, tokenizer = load_source(plan.source, dtype, trusted)
    progress("load", 1, 1)
    ids = calibration_ids(tokenizer, read, plan)
    student, _ = convert_in_memory(loaded.to(device).eval(), plan, ids, seed, progress)
    return swap_costs(student, ids[:CALIBRATION_ROWS].to(device), progress)


def file_name(method: str) -> str:
    """A method or pattern as part of a folder's name."""
    return re.sub(r"[^a-zA-Z0-9.-]+", "-", method.replace("*", "x")).strip("-")
