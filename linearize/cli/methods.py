"""linearize methods: which methods there are, what they cost a model, and the options of each."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from linearize.cli.console import Column, Console
from linearize.cli.flags import Json, complete_method
from linearize.cli.units import number, size

EXAMPLES = """\
linearize methods
linearize methods lolcats
linearize methods --model smollm2
linearize methods --json"""

Name = Annotated[
    str | None,
    typer.Argument(metavar="NAME", help="Show this method's options.", autocompletion=complete_method, show_default=False),
]
Model = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="Show what each method would add to this model.", show_default=False),
]


def methods(name: Name = None, model: Model = None, as_json: Json = False) -> None:
    """List the methods, with their costs for a model, or one method's options."""
    from linearize import methods as registry
    from linearize.conversion.catalogue import describe

    console = Console(as_json)
    if name is not None:
        found = describe(name)
        one(console, found)
        console.data(found)
        return
    every = [describe(each) for each in registry.names()]
    if model is not None:
        costed(console, model, every)
    else:
        columns = (Column("method"), Column("what it is"), Column("paper"))
        console.table(columns, [(m["name"], m["title"], m["paper"]) for m in every])
    console.data(every)


def costed(console: Console, model: str, every: list[dict[str, Any]]) -> None:
    """The methods with their axes, and what each adds to one model."""
    from linearize.conversion.catalogue import costs, shape_of

    called, shape, layers = shape_of(model)
    rows = []
    for method in every:
        method |= costs(method["name"], shape, layers)
        kept = f" + KV of {method['softmax_layers']}" if method["softmax_layers"] else ""
        row = (method["name"], method["axes"], number(method["parameters"]), size(method["state_bytes"]) + kept, method["limits"])
        rows.append(row)
    console.facts([("model", f"{called}  {layers} layers, each of them converted")])
    console.say()
    columns = (Column("method"), Column("mixer"), Column("+ params", True), Column("state / seq", True), Column("known limits"))
    console.table(columns, rows)


def one(console: Console, method: dict[str, Any]) -> None:
    stages = ", ".join(f"{s['kind']} {s['tokens']:,} tokens" for s in method["stages"])
    facts = [
        ("method", method["name"]), ("", method["title"]), ("mixer", method["axes"]), ("layers", ", ".join(method["pattern"])),
        ("paper", method["paper"]), ("limits", method["limits"]), ("stages", stages),
    ]  # fmt: skip
    console.facts([(name, value) for name, value in facts if value])
    console.say()
    rows = [(o["key"], o["type"], json.dumps(o["default"]).strip('"'), o["help"]) for o in method["options"]]
    console.table((Column("--set"), Column("type"), Column("default", True), Column("meaning")), rows)
