"""linearize chat: talk with a checkpoint."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from linearize.cli import flags
from linearize.cli.console import Console

EXAMPLES = """\
linearize chat smollm2-default-distilled
linearize chat smollm2-default-distilled --system "Answer in one line." --temp 0.7
echo "What is the sea?" | linearize chat smollm2-default-distilled"""

System = Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.", show_default="the template's")]


def chat(
    directory: flags.Directory,
    system: System = None,
    max_tokens: flags.MaxTokens = 512,
    temperature: flags.Temperature = 0.0,
    top_p: flags.TopP = 1.0,
    seed: flags.SampleSeed = 0,
    device: flags.Device = "auto",
    dtype: flags.DtypeFlag = flags.Dtype.auto,
    int8: flags.Int8 = False,
    compiled: flags.Compile = False,
) -> None:
    """Talk with a checkpoint, in constant memory.

    Ctrl-C stops the answer and keeps the talk; /help lists the commands. Where stdin is a pipe, each line
    is a message and only the answers are printed.
    """
    from linearize.cli.talk import Talk
    from linearize.serving.session import Run, Session, Settings

    console = Console()
    settings = Settings(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    with console.progress() as report:
        session = Session(directory, system=system, run=Run(device, dtype.value, int8, compiled), report=report)
    Talk(session, settings, console, sys.stdin.isatty()).run()
