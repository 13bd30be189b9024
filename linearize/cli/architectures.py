"""linearize architectures: which model families can be converted, and whether one model can."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from linearize.cli.console import Column, Console
from linearize.cli.flags import Json

EXAMPLES = """\
linearize architectures
linearize architectures smollm2
linearize architectures Qwen/Qwen3-0.6B --json"""

Name = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Say whether this model can be converted, from its config.", show_default=False),
]
PROOF = "pytest tests/parity -k {}"


def architectures(model: Name = None, as_json: Json = False) -> None:
    """List the model families, or say whether one model can be converted."""
    from linearize.conversion.architectures import ARCHITECTURES
    from linearize.conversion.detection import REFUSED, verdict

    console = Console(as_json)
    if model is not None:
        from linearize.conversion.sources import read_source

        found = verdict(read_source(model).config)
        lines = [("model", model), ("family", found.model_type), ("verdict", found.status), ("because", found.reason)]
        console.facts([(name, value) for name, value in (*lines, ("nearest", found.nearest or "")) if value])
        console.data(asdict(found))
        return
    every = ARCHITECTURES.values()
    columns = [Column(title) for title in ("family", "attention", "special", "limits", "its test")]
    console.table(
        columns, [(a.model_type, a.attention, ", ".join(a.special()), a.limits, PROOF.format(a.model_type)) for a in every]
    )
    console.say("\nAny other family whose attention goes through transformers' attention interface is tried by plan and convert.")
    refused: dict[str, list[str]] = {}
    for name, reason in REFUSED.items():
        refused.setdefault(reason, []).append(name)
    for reason, families in refused.items():
        console.say(f"refused, {reason}: {', '.join(families)}")
    console.data({"supported": [asdict(a) for a in every], "refused": REFUSED})
