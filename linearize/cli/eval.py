"""linearize eval: how close the student is to its teacher."""

from __future__ import annotations

from typing import Annotated

import typer

from linearize.cli import flags, show
from linearize.cli.console import Console

EXAMPLES = """\
linearize eval smollm2-default-distilled
linearize eval smollm2-default-distilled --data book.txt --tokens 32k
linearize eval smollm2-default --no-recall --json"""

WHAT = "What is measured"
Data = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE", help="A text file, a folder, a hub data set.", rich_help_panel=WHAT, show_default="held-out built-in text"
    ),
]
Tokens = Annotated[str, typer.Option(metavar="N", help="Tokens to measure on: 8192, 32k.", rich_help_panel=WHAT)]
Teacher = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="The model to compare with.", rich_help_panel=WHAT, show_default="the one converted"),
]
Recall = Annotated[bool, typer.Option("--recall/--no-recall", help="Also ask for a pass-key far back.", rich_help_panel=WHAT)]


def evaluate(
    directory: flags.Directory,
    data: Data = None,
    tokens: Tokens = "8192",
    teacher: Teacher = None,
    recall: Recall = True,
    device: flags.Device = "auto",
    as_json: flags.Json = False,
) -> None:
    """Measure a checkpoint against its teacher.

    Perplexity of teacher, student, window without memory and memory without window, agreement with the
    teacher, each layer's error, and recall of a pass-key.
    """
    from linearize.pipeline import evaluate as run

    console = Console(as_json)
    with console.progress() as progress:
        found = run(
            directory, data=data, tokens=flags.count(tokens), teacher=teacher, recall=recall, device=device, progress=progress
        ).to_dict()
    show.evaluation(console, found)
    console.data(found)
