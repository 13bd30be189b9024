"""Export: a converted model written as a model class that transformers has itself, once it proved to compute the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from linearize.checkpoint import check_space, check_target, staged
from linearize.conversion.hosts import HOSTS, Host, model_reasons
from linearize.errors import IntegrityError, UnsupportedError, UsageError
from linearize.loading import DTYPES, load, pick_dtype
from linearize.modeling.modeling_linearized import PREFIX, attentions
from linearize.modeling.spec import plan_spec
from linearize.opening import check
from linearize.progress import Progress, silent

TARGETS = ("transformers", "fla")
BOUND = 1e-4  # of the relative RMSE of logits
NO_CACHE = " All layers are recurrent, and transformers' cache needs a softmax layer: `generate()` runs without one."
ROWS, LENGTH = 2, 96  # of the comparison: longer than a chunk of any host
CARRIED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "tie_word_embeddings",
    "rope_parameters", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id",
    "embedding_multiplier", "logits_scaling", "residual_multiplier",
)  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """Where the model is, what transformers calls it, and the relative RMSE of its logits against ours, in float32."""

    path: Path
    model_type: str
    requires: str
    dtype: str
    layers: list[int]
    kept: int
    difference: float

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "path": str(self.path)}


def export(
    directory: Path,
    *,
    to: str = "transformers",
    output: Path | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
    progress: Progress = silent,
) -> Exported:
    """Write the checkpoint DIRECTORY as a model of transformers' own, without custom code (default: DIRECTORY-transformers).

    UnsupportedError gives the first reason why that cannot be; IntegrityError if the two models' logits differ, and then
    nothing is written. Compared in float32; `dtype` is that of the written weights, auto the checkpoint's.
    """
    if to not in TARGETS:
        raise UsageError(f"unknown target '{to}'", "--to", f"one of: {', '.join(TARGETS)}")
    config = check(directory)
    host = host_of(config, str(directory), to)
    target = output or directory.with_name(f"{directory.name}-{to}")
    check_target(target, overwrite, directory.resolve())
    stored = (
        pick_dtype(dtype, None, torch.device("cpu")) if dtype != "auto" else DTYPES.get(str(config.get("dtype")), torch.float32)
    )
    progress("load", 0, 1)
    model, tokenizer = load(directory, dtype="float32", device="cpu")
    progress("load", 1, 1)
    check_space(target, sum(p.numel() for p in model.parameters()) * stored.itemsize)
    native = as_native(model, host)
    progress("compare", 0, 1)
    difference = compare(model, native, str(directory))
    progress("compare", 1, 1)
    layers = [layer["index"] for layer in config["linearize"]["layers"]]
    made = Exported(
        target, host.model_type, f"transformers>={host.needs}", str(stored).removeprefix("torch."), layers,
        config["num_hidden_layers"] - len(layers), difference,
    )  # fmt: skip
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with staged(target, overwrite, created=created, exported=host.model_type) as stage:
        native.to(stored).save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        (stage / "README.md").write_text(card(config["linearize"], made), encoding="utf-8")
    return made


# ---- whether ----


def host_of(config: Mapping[str, Any], where: str, to: str = "transformers") -> Host:
    """The model class that computes what a checkpoint's config says; UnsupportedError gives the first reason why none does."""
    plan = config["linearize"]
    specs = [plan_spec(plan, layer) for layer in plan["layers"]]
    first, shape = specs[0]
    host = HOSTS.get(first.rule)
    if host is None:
        raise refused(f"no class of transformers has a memory with rule '{first.rule}'", where)
    teacher = str(config["model_type"]).removeprefix(PREFIX)
    for spec, _ in dict.fromkeys(specs):
        reason = next((reason for broken, reason in host.reasons(spec, shape, config) if broken), None)
        if reason is not None:
            raise refused(reason, where)
    if len({spec.conv for spec, _ in specs}) > 1:
        raise refused("its layers' convolutions differ in length", where)
    if teacher not in host.teachers:
        fix = f"--method {host.method} goes with {', '.join(host.teachers)}"
        raise UnsupportedError(
            f"cannot be exported: {host.model_type} has no place for the other weights of '{teacher}'", where, fix
        )
    converted = {layer["index"] for layer in plan["layers"]}
    kept = [i for i in range(config["num_hidden_layers"]) if i not in converted]
    for broken, reason in model_reasons(config, host.model_type, kept):
        if broken:
            raise UnsupportedError(f"cannot be exported: {reason}", where, "use the checkpoint as it is: linearize generate, chat")
    return host


def refused(reason: str, where: str) -> UnsupportedError:
    known = " or ".join(f"--method {host.method} ({', '.join(host.teachers)} models)" for host in HOSTS.values())
    return UnsupportedError(
        f"cannot be exported: {reason}", where, f"convert the original model with {known} and --set native=true"
    )


# ---- how ----


def as_native(model: Any, host: Host) -> Any:
    """The same weights in transformers' own model, in float32."""
    values, converted = model.config.to_dict(), {module.linearize_index: module for module in attentions(model)}
    first: Any = next(iter(converted.values()))
    spec, shape = first.linearize.spec, first.linearize.shape
    types = ["linear_attention" if i in converted else "full_attention" for i in range(values["num_hidden_layers"])]
    carried = {key: values[key] for key in CARRIED if key in values}
    config = AutoConfig.for_model(host.model_type, **{**carried, **host.config(spec, shape, values), "layer_types": types})
    modules = {module: name for name, module in model.named_modules()}
    taken = {index: modules[module] for index, module in converted.items()}
    weights = model.state_dict()
    found = host.rest({name: x for name, x in weights.items() if not name.startswith(tuple(f"{at}." for at in taken.values()))})
    for index, at in taken.items():
        layer = at.rpartition(".")[0]
        found |= {f"{layer}.{name}": x for name, x in host.layer(converted[index]).items()}
    with torch.no_grad():
        native = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        native.load_state_dict({name: x.float() for name, x in found.items()})  # strict: each weight has its place
    native.generation_config = model.generation_config
    if "full_attention" not in types:  # transformers' cache asks a softmax layer how long it is, and raises where there is none
        native.config.use_cache = native.generation_config.use_cache = False
    return native.eval()


@torch.no_grad()
def compare(model: Any, native: Any, where: str) -> float:
    """Relative RMSE of the two models' logits on random text; IntegrityError above the bound."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (ROWS, LENGTH), generator=generator)
    ours, theirs = (m(ids, use_cache=False).logits.double() for m in (model, native))
    difference = float((ours - theirs).norm() / ours.norm())
    if not difference <= BOUND:
        raise IntegrityError(
            f"the exported model computes something else: its logits differ by {difference:.1e}", where,
            f"nothing was written; transformers is {transformers.__version__}, this was made for 5.23",
        )  # fmt: skip
    return difference


def card(plan: Mapping[str, Any], made: Exported) -> str:
    """A model card that says where the model comes from and what loads it."""
    base, count = plan["source"]["id"], len(made.layers)
    return (
        f"---\nbase_model: {base}\nlibrary_name: transformers\ntags: [linear-attention]\n---\n\n"
        f"# {base} with {count} of {count + made.kept} layers linearized\n\n"
        f"Method `{plan['method']}`, written by linearize {plan['version']} as a `{made.model_type}` model. It needs "
        f"`{made.requires}` and no other code. Relative RMSE of its logits against the linearized model's, in float32: "
        f"{made.difference:.0e}.{'' if made.kept else NO_CACHE}\n\n```python\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(PATH)\n```\n"
    )
