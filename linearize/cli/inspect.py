"""linearize inspect: what a checkpoint is, without loading it."""

from __future__ import annotations

from typing import Annotated

import typer

from linearize.cli import flags, show
from linearize.cli.console import Console

EXAMPLES = """\
linearize inspect smollm2-default
linearize inspect smollm2-default --no-verify --json"""

Verify = Annotated[bool, typer.Option("--verify/--no-verify", help="Read every file and compare its hash.")]


def inspect(directory: flags.Directory, verify: Verify = True, as_json: flags.Json = False) -> None:
    """Show what a checkpoint is, without loading it."""
    from linearize.conversion.inspection import inspect as run

    console = Console(as_json)
    found = run(directory, verify=verify)
    show.checkpoint(console, found)
    console.data(found)
