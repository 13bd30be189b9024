"""linearize methods: which methods there are, and the options of each."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from linearize.cli.console import Column, Console
from linearize.cli.flags import Json, complete_method

EXAMPLES = """\
linearize methods
linearize methods lolcats
linearize methods --json"""

Name = Annotated[
    str | None,
    typer.Argument(metavar="NAME", help="Show this method's options.", autocompletion=complete_method, show_default=False),
]


def methods(name: Name = None, as_json: Json = False) -> None:
    """List the methods, or one method's options."""
    from linearize import methods as registry

    console = Console(as_json)
    if name is None:
        found = [describe(each) for each in registry.names()]
        columns = (Column("method"), Column("what it is"), Column("paper"))
        console.table(columns, [(m["name"], m["title"], m["paper"]) for m in found])
        console.data(found)
        return
    found_one = describe(name)
    one(console, found_one)
    console.data(found_one)


def describe(name: str) -> dict[str, Any]:
    from linearize import methods as registry

    method = registry.get(name)
    return {
        "name": name,
        "title": method.title(),
        "paper": method.paper,
        "options": method.options(),
        "stages": [asdict(stage) for stage in method.stages],
    }


def one(console: Console, method: dict[str, Any]) -> None:
    stages = ", ".join(f"{s['kind']} {s['tokens']:,} tokens" for s in method["stages"])
    console.facts([("method", method["name"]), ("", method["title"]), ("paper", method["paper"]), ("stages", stages)])
    console.say()
    rows = [(o["key"], o["type"], json.dumps(o["default"]).strip('"'), o["help"]) for o in method["options"]]
    console.table((Column("--set"), Column("type"), Column("default", True), Column("meaning")), rows)
