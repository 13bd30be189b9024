"""linearize convert and linearize plan: a model's attention layers become mixers."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linearize.cli import flags, show
from linearize.cli.console import Console
from linearize.errors import UsageError
from linearize.methods import DEFAULT

if TYPE_CHECKING:
    from linearize.recipe import Recipe

EXAMPLES = """\
linearize convert smollm2
linearize convert llama --method hedgehog
linearize convert ./Qwen3-0.6B -m lolcats --set window=128 -o qwen-lolcats
linearize convert smollm2 --state-budget 4MB
linearize convert model.gguf --layers every:4 --dry-run"""
PLAN_EXAMPLES = """\
linearize plan smollm2
linearize plan smollm2 --recipe recipes/smollm2-5mb.yaml
linearize plan ./Qwen3-0.6B --method liger --layers 0-13 --json"""

RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        metavar="FILE",
        help="Method, options and held-out share of a recipe.",
        rich_help_panel=flags.NEW,
        show_default=False,
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.", rich_help_panel=flags.OUTPUT)]


def convert(
    model: flags.Model,
    method: flags.MethodName = DEFAULT,
    layers: flags.Layers = None,
    set_: flags.Set = None,
    recipe: RecipeFile = None,
    state_budget: flags.StateBudget = None,
    start: flags.StartFlag = flags.Start.calibrated,
    calibration: flags.Calibration = None,
    calibration_length: flags.CalibrationLength = None,
    held_out: flags.HeldOut = None,
    dtype: flags.DtypeFlag = flags.Dtype.auto,
    device: flags.Device = "auto",
    seed: flags.Seed = 0,
    revision: flags.Revision = None,
    output: flags.Output = None,
    dry_run: DryRun = False,
    as_json: flags.Json = False,
    overwrite: flags.Overwrite = False,
    trust_remote_code: flags.TrustRemoteCode = False,
) -> None:
    """Convert a model: its attention layers become mixers.

    Weights stay as they are; each attention layer gets a mixer whose new parameters are fitted to the
    softmax that it replaces. Writes <model>-<method> unless -o says otherwise.
    """
    wanted = recipe_of_flags(recipe, method, set_ or ())
    if dry_run and state_budget:
        raise UsageError("a state budget measures the model", "--dry-run", "leave out one of the two")
    if dry_run:
        return _plan(
            "the same without --dry-run", model, wanted, layers, start, dtype, device, revision, as_json, trust_remote_code
        )
    from linearize.conversion.convert import convert as run

    console = Console(as_json)
    with console.progress() as progress:
        made = run(
            model, method=wanted.method, output=output, layers=layers, options=wanted.options,
            state_budget=flags.state_bytes(state_budget) if state_budget else None, dtype=dtype.value,
            device=device, revision=revision, trust_remote_code=trust_remote_code, seed=seed, calibration=calibration,
            calibration_length=flags.count(calibration_length) if calibration_length else None,
            held_out=held_out or wanted.held_out, start=start.value, overwrite=overwrite, progress=progress,
        )  # fmt: skip
    show.frontier(console, [layout.to_dict() for layout in made.frontier], made.plan.state_bytes)
    causal = made.plan.architecture.causal
    show.plan(console, made.plan.to_dict())
    show.swap_costs(console, made.swap_costs, made.plan.parts)
    show.start_errors(console, sorted(made.plan.parts), made.errors)
    console.say(f"\nsaved    {made.path}")
    console.say(f"next     linearize distill {made.path}" + (f"\n         linearize chat {made.path}" if causal else ""))
    console.data(made.to_dict())
    return None


def plan(
    model: flags.Model,
    method: flags.MethodName = DEFAULT,
    layers: flags.Layers = None,
    set_: flags.Set = None,
    recipe: RecipeFile = None,
    start: flags.StartFlag = flags.Start.calibrated,
    dtype: flags.DtypeFlag = flags.Dtype.auto,
    device: flags.Device = "auto",
    revision: flags.Revision = None,
    as_json: flags.Json = False,
    trust_remote_code: flags.TrustRemoteCode = False,
) -> None:
    """Show what convert would do, and what it costs.

    Nothing is loaded: at most config.json is fetched. The same as convert --dry-run.
    """
    flagged = {
        "--method": [method] if method != DEFAULT else [], "--layers": [layers or ""], "--set": set_ or [],
        "--recipe": [str(recipe)] if recipe else [],
        "--start": [start.value] if start != flags.Start.calibrated else [],
        "--dtype": [dtype.value] if dtype != flags.Dtype.auto else [],
        "--device": [device] if device != "auto" else [], "--revision": [revision or ""],
    }  # fmt: skip
    chosen = "".join(f" {flag} {shlex.quote(value)}" for flag, values in flagged.items() for value in values if value)
    chosen += " --trust-remote-code" if trust_remote_code else ""
    again = f"linearize convert {shlex.quote(model)}{chosen}"
    wanted = recipe_of_flags(recipe, method, set_ or ())
    _plan(again, model, wanted, layers, start, dtype, device, revision, as_json, trust_remote_code)


def recipe_of_flags(path: Path | None, method: str, pairs: Iterable[str]) -> Recipe:
    """What the flags say, or a recipe with the options of the flags over its own. UsageError where both name a method."""
    from linearize.recipe import Recipe, read, recipe_of

    options = flags.options(pairs)
    if path is None:
        return Recipe(method, options)
    if method != DEFAULT:
        raise UsageError("the recipe names the method", "--method", "leave out one of --method and --recipe")
    made = recipe_of(read(path), where=str(path))
    return replace(made, options={**made.options, **options})


def _plan(
    again: str, model: str, wanted: Recipe, layers: str | None, start: flags.Start, dtype: flags.Dtype, device: str,
    revision: str | None, as_json: bool, trust_remote_code: bool,
) -> None:  # fmt: skip
    """Show a plan, and `again`, what writes it."""
    from linearize.conversion.estimates import estimate
    from linearize.conversion.plan import make_plan

    console = Console(as_json)
    planned = make_plan(
        model, method=wanted.method, options=wanted.options, layers=layers, start=start.value, revision=revision,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    made = {**planned.to_dict(), "estimates": estimate(planned, dtype.value, device, stages=wanted.stages).to_dict()}
    show.plan(console, made)
    console.say(f"\nnothing was written; to write it: {again}")
    console.data(made)
