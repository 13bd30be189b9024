"""linearize merge: an adapter that was kept apart becomes part of the weights."""

from __future__ import annotations

from linearize.cli import flags
from linearize.cli.console import Console

EXAMPLES = """\
linearize merge smollm2-default-distilled
linearize merge smollm2-default-distilled -o smollm2-linear"""


def merge(
    directory: flags.Directory, output: flags.Output = None, as_json: flags.Json = False, overwrite: flags.Overwrite = False
) -> None:
    """Add an adapter that distill --no-merge kept apart into the weights.

    Writes DIR-merged unless -o says otherwise.
    """
    from linearize.distillation.merging import merge as run

    console = Console(as_json)
    with console.progress() as progress:
        path = run(directory, output=output, overwrite=overwrite, progress=progress)
    console.say(f"\nsaved    {path}\nnext     linearize chat {path}")
    console.data({"path": str(path)})
