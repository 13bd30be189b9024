"""linearize generate: continue a prompt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linearize.cli import flags, show
from linearize.cli.console import Console

if TYPE_CHECKING:
    from linearize.progress import Progress
    from linearize.serving.generate import Completion, Run
    from linearize.serving.session import Session

EXAMPLES = """\
linearize generate smollm2-default --prompt "The sea is"
linearize generate smollm2-default --prompt "Name a colour." --chat
linearize generate smollm2-default --prompt - --max-tokens 64 < story.txt
linearize generate smollm2-default --prompt "Once" --temp 0.8 --seed 1 --json
linearize generate smollm2-default --prompt "Once" --dtype bfloat16 --int8 --compile"""

Prompt = Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="What to continue; - reads stdin.", show_default=False)]
Chat = Annotated[bool, typer.Option("--chat", help="Ask it through the model's chat template.")]


def generate(
    directory: flags.Directory,
    prompt: Prompt,
    chat: Chat = False,
    max_tokens: flags.MaxTokens = 256,
    temperature: flags.Temperature = 0.0,
    top_p: flags.TopP = 1.0,
    seed: flags.SampleSeed = 0,
    device: flags.Device = "auto",
    dtype: flags.DtypeFlag = flags.Dtype.auto,
    int8: flags.Int8 = False,
    compiled: flags.Compile = False,
    as_json: flags.Json = False,
) -> None:
    """Continue a prompt, streaming."""
    from linearize.serving.session import Run, Settings

    console = Console(as_json)
    text = clean(sys.stdin.read() if prompt == "-" else prompt)
    settings = Settings(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    with console.progress() as report:
        source = opened(directory, Run(device, dtype.value, int8, compiled), chat, report)
    pieces = []
    for piece in source.ask(text, settings) if chat else source.stream(text, settings):  # type: ignore[union-attr]
        pieces.append(piece)
        console.stream(piece)
    console.say()
    if not as_json:
        console.grey(show.stats(source.last))
    console.data({"prompt": text, "text": "".join(pieces), **source.last})


def opened(directory: Path, run: Run, chat: bool, report: Progress) -> Completion | Session:
    if chat:
        from linearize.serving.session import Session

        return Session(directory, run=run, report=report)
    from linearize.serving.generate import Completion

    return Completion(directory, run, report)


def clean(text: str) -> str:
    """Text that every tokenizer takes: bytes that are no UTF-8 become U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace") if has_escapes(text) else text


def has_escapes(text: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in text)
