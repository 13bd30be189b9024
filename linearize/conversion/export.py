"""Export: a converted model written as a model class that other software has, once it proved to compute the same."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from linearize.checkpoint import check_space, check_target, staged
from linearize.conversion.architectures import ARCHITECTURES
from linearize.conversion.hosts import Host, model_reasons
from linearize.conversion.hosts_fla import FLA
from linearize.conversion.hosts_transformers import TRANSFORMERS
from linearize.devices import pick_dtype
from linearize.errors import IntegrityError, ResourceError, UnsupportedError, UsageError
from linearize.loading import check_adapter_apart, load
from linearize.modeling.modeling_linearized import PREFIX, attentions
from linearize.modeling.plans import plan_layers, plan_spec
from linearize.modeling.spec import MixerSpec, Shape
from linearize.opening import check
from linearize.progress import Progress, silent

HOSTS = {"transformers": TRANSFORMERS, "fla": FLA}  # by a mixer's rule
BOUND = 1e-4  # of the relative RMSE of logits
ROWS, LENGTH = 2, 96  # of the comparison: longer than a chunk of any host
AS_IT_IS = "use the checkpoint as it is: linearize generate, linearize chat"


@dataclass(frozen=True)
class Exported:
    """Where the model is, what it is called, what loads it, and the relative RMSE of its logits against ours, in float32.

    `difference` is None where the host runs on a GPU alone and there is none.
    """

    path: Path
    model_type: str
    requires: str
    dtype: str
    layers: list[int]
    kept: list[int]
    difference: float | None

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
    """Write the checkpoint DIRECTORY as a model of another library's own class, without custom code (default: DIRECTORY-<to>).

    UnsupportedError gives the first reason why that cannot be; IntegrityError if the two models' logits differ, and then
    nothing is written. They are compared in float32; `dtype` is that of the written weights, auto the checkpoint's.
    """
    if to not in HOSTS:
        raise UsageError(f"unknown target '{to}'", "--to", f"one of: {', '.join(HOSTS)}")
    config, where = check(directory), str(directory)
    check_adapter_apart(directory)
    host = host_of(config, where, to)
    target = output or directory.with_name(f"{directory.name}-{to}")
    check_target(target, overwrite, directory.resolve())
    make_known(host, to)
    stored = pick_dtype(config.get("dtype", "float32") if dtype == "auto" else dtype, None, torch.device("cpu"))
    progress("load", 0, 1)
    model, tokenizer = load(directory, dtype="float32", device="cpu")
    progress("load", 1, 1)
    check_space(target, sum(p.numel() for p in model.parameters()) * stored.itemsize)
    native = as_native(model, host)
    progress("compare", 0, 1)
    difference = None if host.kernels and not torch.cuda.is_available() else compare(model, native, where, host.kernels)
    progress("compare", 1, 1)
    made = Exported(
        target, host.model_type, host.requires, str(stored).removeprefix("torch."), converted(config), kept(config), difference
    )
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with staged(target, overwrite, created=created, exported=host.model_type) as stage:
        native.to(device="cpu", dtype=stored).save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        (stage / "README.md").write_text(card(config["linearize"], made, host), encoding="utf-8")
    return made


# ---- whether ----


def converted(config: Mapping[str, Any]) -> list[int]:
    return [layer["index"] for layer in config["linearize"]["layers"]]


def kept(config: Mapping[str, Any]) -> list[int]:
    return [i for i in range(config["num_hidden_layers"]) if i not in converted(config)]


def host_of(config: Mapping[str, Any], where: str, to: str) -> Host:
    """The model class that computes what a checkpoint's config says; UnsupportedError gives the first reason why none does."""
    hosts, rule = HOSTS[to], specs_of(config)[0][0].rule
    for reason, fix in objections(config, rule, to):
        raise UnsupportedError(f"cannot be exported: {reason}", where, fix)
    return hosts[rule]


def specs_of(config: Mapping[str, Any]) -> list[tuple[MixerSpec, Shape]]:
    """The mixers of a checkpoint's layers, each once."""
    plan = config["linearize"]
    return list(dict.fromkeys(plan_spec(plan, layer) for layer in plan_layers(plan)))


def objections(config: Mapping[str, Any], rule: str, to: str) -> Iterator[tuple[str, str]]:
    """What stands against the host for this rule, and what to do: first the mixers, then the model, then what stayed softmax."""
    hosts, specs = HOSTS[to], specs_of(config)
    known = " or ".join(f"--method {host.method} ({', '.join(host.teachers)} models)" for host in hosts.values())
    again = f"convert the original model with {known} and --set native=true"
    if rule not in hosts:
        yield f"no model class of {to} has a memory with rule '{rule}'", again
        return
    host = hosts[rule]
    yield from ((reason, again) for spec, shape in specs for broken, reason in host.reasons(spec, shape, config) if broken)
    if len({spec.conv for spec, _ in specs}) > 1:
        yield "its layers' convolutions differ in length", again
    teacher = str(config["model_type"]).removeprefix(PREFIX)
    if teacher not in host.teachers:
        yield f"{host.model_type} has no place for the other weights of '{teacher}'", again
    stays = kept(config)
    if stays and not host.keeps:
        yield (
            f"layers such as {stays[0]} are softmax, and export writes none for {to}",
            f"convert all layers, or --to {next(iter(HOSTS))}",
        )
    reasons = model_reasons(config, host.model_type, stays, ARCHITECTURES[teacher].sliding(config))
    yield from ((reason, AS_IT_IS) for broken, reason in reasons if broken)


def make_known(host: Host, to: str) -> None:
    """Make transformers know the class. ResourceError where the package is missing or computes something else yet."""
    try:
        own = version(host.package)
        if tuple(int(part) for part in own.split(".")[:2]) < host.version:
            raise ResourceError(f"{host.model_type} of {host.package} {own} computes something else", f"--to {to}", install(host))
        if host.module:
            importlib.import_module(host.module)
    except (PackageNotFoundError, ImportError) as error:
        raise ResourceError(f"{host.package} is not installed", f"--to {to}", install(host)) from error


def install(host: Host) -> str:
    return f"pip install '{host.requires}'"


# ---- how ----


def as_native(model: Any, host: Host) -> Any:
    """The same weights in the host's model class, in float32."""
    values = model.config.to_dict()
    modules = {module: name for name, module in model.named_modules()}
    taken = {modules[module]: module for module in attentions(model)}
    first: Any = next(iter(taken.values()))
    config = AutoConfig.for_model(host.model_type, **host.config(first.linearize.spec, first.linearize.shape, values, kept(values)))
    below = tuple(f"{name}." for name in taken)
    weights = host.rest({name: x for name, x in model.state_dict().items() if not name.startswith(below)})
    for name, attention in taken.items():
        layer = name.rpartition(".")[0]
        weights |= {f"{layer}.{own}": x for own, x in host.layer(attention).items()}
    native = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    native.load_state_dict({name: x.detach().float() for name, x in weights.items()})  # strict: each weight has its place
    native.generation_config = model.generation_config
    native.generation_config.use_cache = config.use_cache
    return native.eval()


@torch.no_grad()
def compare(model: Any, native: Any, where: str, kernels: bool = False) -> float:
    """Relative RMSE of the two models' logits on random text; IntegrityError above the bound."""
    ids = torch.randint(0, model.config.vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    ours = model(ids, use_cache=False).logits.double()
    device = torch.device("cuda" if kernels else "cpu")
    theirs = native.to(device)(ids.to(device), use_cache=False).logits.cpu().double()
    difference = float((ours - theirs).norm() / ours.norm())
    if not difference <= BOUND:
        raise IntegrityError(
            f"the exported model computes something else: relative RMSE of its logits {difference:.1e}", where,
            "nothing was written; please report it with the versions that linearize --version shows",
        )  # fmt: skip
    return difference


def card(plan: Mapping[str, Any], made: Exported, host: Host) -> str:
    """A model card that says where the model comes from and what loads it."""
    base, count = plan["source"]["id"], len(made.layers)
    measured = "not compared yet" if made.difference is None else f"{made.difference:.0e}"
    uncached = " All layers are recurrent, and transformers' cache needs a softmax layer: `generate()` runs without one."
    imported = f"import {host.module}\n" if host.module else ""
    return (
        f"---\nbase_model: {base}\nlibrary_name: transformers\ntags: [linear-attention]\n---\n\n"
        f"# {base} with {count} of {count + len(made.kept)} layers linearized\n\n"
        f"Method `{plan['method']}`, written by linearize {plan['version']} as a `{made.model_type}` model. It needs "
        f"`{made.requires}`: earlier versions may load it and compute something else. Relative RMSE of its logits against the "
        f"linearized model's, in float32: {measured}.{'' if made.kept or host.module else uncached}\n\n```python\n{imported}"
        "from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained(PATH)\n```\n"
    )
