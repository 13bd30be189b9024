"""Conversion: the original weights, mixers added where the plan says, started from a few sequences, saved as a checkpoint."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from linearize import text
from linearize.checkpoint import check_space, check_target, staged
from linearize.conversion.calibration import start_mixers
from linearize.conversion.offload import ON_DISK, finite, offload, release, scratch, spill
from linearize.conversion.plan import Plan, plan_for
from linearize.conversion.ranking import dearest, swap_costs
from linearize.conversion.selection import AUTO, kept_count
from linearize.conversion.sources import ALIASES, Source, resolve
from linearize.conversion.streaming import CALIBRATION_LENGTH, CALIBRATION_ROWS, SHARD_BYTES
from linearize.errors import HubError, IntegrityError, UnsupportedError, UsageError
from linearize.loading import pick_device, pick_dtype
from linearize.methods import DEFAULT
from linearize.methods.base import STARTS
from linearize.methods.layout import layout
from linearize.modeling.modeling_linearized import install, linearized_class
from linearize.progress import Progress, silent

OWN_LENGTH = 128
GENERATION_KEYS = {"pad_token_id", "bos_token_id", "eos_token_id"}


@dataclass(frozen=True)
class Converted:
    """Where the checkpoint is, what was planned, and each layer's relative error after its start."""

    path: Path
    plan: Plan
    errors: list[float]
    swap_costs: Mapping[int, float]

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "plan": self.plan.to_dict(),
            "relative_error": self.errors,
            "swap_costs": dict(self.swap_costs),
        }


def load_source(
    source: Source, dtype: torch.dtype, trust_remote_code: bool = False, offload_to: Path | None = None
) -> tuple[nn.Module, Any]:
    """The original model and its tokenizer.

    With `offload_to` the weights stay in the source's files, and those that transformers fuses on loading go to that folder.
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
        options |= {"device_map": dict(ON_DISK), "offload_folder": str(offload_to)}
    try:
        model = AutoModelForCausalLM.from_pretrained(where, revision=source.revision, use_safetensors=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(where, revision=source.revision)
    except OSError as error:
        if source.format != "hub":
            raise IntegrityError("the model cannot be loaded", where, str(error).splitlines()[0]) from error
        raise HubError("the weights cannot be fetched", where, "check the network, or point at a local copy") from error
    return model, tokenizer


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
    """Convert a transformers CausalLM in memory. `calibration` (B, T) are token ids; without it the model's own text serves.

    Returns a model that generates, saves and trains as any other; the given one lends it its modules.
    """
    values = model.config.to_dict()  # type: ignore[union-attr, operator]
    if values.get("linearize"):
        raise UnsupportedError("this model is already linearized", type(model).__name__, "pass the original model")
    known = source or Source(type(model).__name__, getattr(model, "name_or_path", "") or "in memory", "memory", None, values)
    plan = plan_for(known, method, layers, options or {}, start)
    new, _ = convert_in_memory(model, plan, calibration, seed, progress)
    return new


def convert_in_memory(model: nn.Module, plan: Plan, ids: Tensor | None, seed: int, progress: Progress) -> tuple[Any, list[float]]:
    """Attach the plan's mixers to the model and start them on ids (B, T); returns it and each layer's relative error."""
    training = model.training
    if ids is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            ids = own_text(model.eval())
    new = attach(model.eval(), plan.config_field(), torch.device("meta"))
    device = next(model.parameters()).device
    errors = start_mixers(new, plan, ids, seed, device, progress)
    return new.train(training), errors


def convert_on_disk(
    model: nn.Module, plan: Plan, ids: Tensor, seed: int, progress: Progress, device: torch.device, folder: Path
) -> tuple[Any, list[float]]:
    """`convert_in_memory` for a model that was loaded to disk: weights stay there, and started mixers go to `folder`."""
    shards = release(model, folder)
    new = attach(model.eval(), plan.config_field(), torch.device("meta"))
    offload(new, shards, device)
    new.hf_device_map = dict(ON_DISK)  # so save_pretrained knows that it must read what it writes

    def after(attention: Any) -> None:
        module = plan.architecture.attention.format(attention.linearize_index)
        spill(attention.linearize, shards, device, f"{module}.linearize")

    errors = start_mixers(new, plan, ids, seed, device, progress, after)
    new.tie_weights()  # hooks part what was one parameter
    total, done = len(dict(new.named_parameters())), count(1)
    shards.told = lambda: progress("save", next(done), total)
    return new, errors


def own_text(model: Any) -> Tensor:
    """Token ids (rows, length) that the model itself samples: for a conversion that is given no text."""
    begin = torch.tensor([[model.config.bos_token_id or 0]] * CALIBRATION_ROWS, device=model.device)
    length = min(OWN_LENGTH, getattr(model.config, "max_position_embeddings", OWN_LENGTH))
    options = {"do_sample": True, "max_length": length, "min_length": length, "pad_token_id": 0}
    return model.generate(begin, attention_mask=torch.ones_like(begin), **options)  # type: ignore[no-any-return]


def calibration_ids(tokenizer: Any, path: Path | None) -> Tensor:
    """Token ids (rows, length) of the calibration text: whole rows inside one document where there are any."""
    docs = text.documents(str(path) if path is not None else text.BUILTIN)
    training, _ = text.split(docs)
    tokens = text.tokenise(tokenizer, training)
    longest = max(len(doc) for doc in tokens)
    rows = text.whole(tokens, min(CALIBRATION_LENGTH, max(longest, 2)))
    step = max(len(rows) // CALIBRATION_ROWS, 1)
    return rows.ids[::step][:CALIBRATION_ROWS]


def convert(
    model: str,
    *,
    method: str = DEFAULT,
    output: Path | None = None,
    layers: str | None = None,
    options: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    calibration: Path | None = None,
    start: str = "calibrated",
    overwrite: bool = False,
    progress: Progress = silent,
) -> Converted:
    """Convert MODEL into a checkpoint folder (default: its name and the method's). Nothing is overwritten unasked."""
    layout(method, options, start)
    if start not in STARTS:
        raise UsageError(f"unknown start '{start}'", "--start", f"one of: {', '.join(STARTS)}")
    if calibration is not None:
        text.documents(str(calibration))  # a bad file is said before the model is loaded
    source = resolve(model, revision, trust_remote_code)
    keeps = layers if layers is not None and layers.startswith(AUTO) else None
    plan = plan_for(source, method, None if keeps else layers, options or {}, start)
    count = kept_count(keeps, len(plan.parts)) if keeps else 0
    target = output or Path(f"{source.name}-{file_name(method)}")
    check_target(target, overwrite, source.path)
    on = pick_device(device)
    stored = (
        "float32" if source.format == "gguf" else str(source.config.get("dtype") or source.config.get("torch_dtype") or "float32")
    )
    as_stored, costs = pick_dtype(dtype, stored, on), dict[int, float]()
    if keeps:
        costs = measure_swaps(plan, as_stored, on, calibration, seed, trust_remote_code, progress)
        chosen = sorted(set(costs) - set(dearest(costs, count)))
        plan = plan_for(source, method, ",".join(map(str, chosen)), options or {}, start)
    with scratch(target) if plan.route.streamed else nullcontext() as folder:
        progress("load", 0, 1)
        loaded, tokenizer = load_source(source, as_stored, trust_remote_code, folder)
        progress("load", 1, 1)
        check_space(target, sum(p.numel() * p.element_size() for p in loaded.parameters()) * 2)
        ids = calibration_ids(tokenizer, calibration)
        if folder is None:
            new, errors = convert_in_memory(loaded.to(on).eval(), plan, ids, seed, progress)
        else:
            new, errors = convert_on_disk(loaded, plan, ids, seed, progress, on, folder)
        progress("save", 0, 1)
        save(new, tokenizer, target, overwrite=overwrite, recipe={"swap_costs": costs} if costs else None)
        progress("save", 1, 1)
    return Converted(target, plan, errors, costs)


def measure_swaps(
    plan: Plan, dtype: torch.dtype, device: torch.device, calibration: Path | None, seed: int, trusted: bool, progress: Progress
) -> dict[int, float]:
    """What each layer's swap costs, on the whole model in memory: KL in nats a token, by layer."""
    progress("load", 0, 1)
    loaded, tokenizer = load_source(plan.source, dtype, trusted)
    progress("load", 1, 1)
    ids = calibration_ids(tokenizer, calibration)
    student, _ = convert_in_memory(loaded.to(device).eval(), plan, ids, seed, progress)
    return swap_costs(student, ids.to(device), progress)


def file_name(method: str) -> str:
    """A method or pattern as part of a folder's name."""
    return re.sub(r"[^a-zA-Z0-9.-]+", "-", method.replace("*", "x")).strip("-")


def save(
    model: Any, tokenizer: Any, output: Path, *,
    overwrite: bool = False, recipe: Mapping[str, Any] | None = None, files: Sequence[Path] = (),
) -> None:  # fmt: skip
    """Write a whole checkpoint: weights, config, tokenizer, runtime, resolved recipe, model card, `files`, and the manifest."""
    plan = model.config.linearize
    bad = [name for name, p in model.named_parameters() if not finite(p)]
    if bad:
        raise IntegrityError(f"{bad[0]} has non-finite values", str(output), "nothing was written; check the source weights")
    with staged(
        output, overwrite, schema=plan["schema"], created=datetime.now(timezone.utc).isoformat(timespec="seconds")
    ) as stage:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Attempting to save a model with offloaded modules"
            )  # it reads them a shard at a time
            model.save_pretrained(stage, max_shard_size=SHARD_BYTES)
        tokenizer.save_pretrained(stage)
        resolved = {"method": plan["method"], "options": plan["options"], "start": plan["start"], **(recipe or {})}
        (stage / "recipe.json").write_text(json.dumps(resolved, indent=2) + "\n", encoding="utf-8")
        (stage / "README.md").write_text(plain_card(plan), encoding="utf-8")
        for path in files:
            shutil.copyfile(path, stage / path.name)


def plain_card(plan: Mapping[str, Any]) -> str:
    """A model card that claims nothing: no figure was measured yet."""
    base = plan["source"]["id"]
    front = f"---\nbase_model: {base}\nlibrary_name: transformers\ntags: [linearize, linear-attention]\n---\n"
    stages = ", ".join(stage["kind"] for stage in plan["stages"]) or "none: the mixers are as they were started"
    return (
        f"{front}\n# {base} with {len(plan['layers'])} layers linearized\n\nMethod `{plan['method']}`, trained stages: {stages}. "
        "State of constant size.\n\n```python\nimport linearize  # or trust_remote_code=True\n"
        "from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained(PATH)\n```\n"
    )


__all__ = ["ALIASES", "Converted", "convert", "convert_model", "load_source", "save"]
