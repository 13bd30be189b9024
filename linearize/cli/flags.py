"""Flags that several verbs share, their parsing, and what the shell completes."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from linearize.errors import UsageError

NEW, LEARN, HOW, OUTPUT, DANGEROUS = "What becomes of it", "What it learns from", "How it runs", "Output", "Dangerous"


class Start(str, Enum):
    """How new parameters start."""

    calibrated = "calibrated"
    published = "published"


class Dtype(str, Enum):
    """Storage of the weights."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class StageKind(str, Enum):
    """Which stages of distillation run."""

    attention = "attention"
    lora = "lora"
    long = "long"
    all = "all"


def count(text: str | int) -> int:
    """A number of tokens: 200000, 200k or 1.5M."""
    from linearize.recipe import count as read

    try:
        return read(text)
    except (ValueError, OverflowError):
        raise typer.BadParameter(f"'{text}' is not a number of tokens such as 200000, 200k or 1.5M") from None


def counts(text: str) -> list[int]:
    """Numbers of tokens, the smallest first: 512,1k,8k. None, where the text is empty."""
    return sorted({count(part) for part in text.replace(" ", "").split(",") if part})


def state_bytes(text: str) -> int:
    """Bytes: 4000000, 500KB or 4MB, of 10^3 and 10^6."""
    try:
        return count(text.strip().upper().removesuffix("B"))
    except typer.BadParameter:
        raise typer.BadParameter(f"'{text}' is not a size such as 500KB or 4MB") from None


def new_folder(path: Path | None) -> Path | None:
    """Refuse `-o ""` and `-o .`: replacing the current folder is never meant."""
    if path is not None and path == Path():
        raise UsageError("the output cannot be the current folder", "--output", "-o NEW_FOLDER")
    return path


def options(pairs: Iterable[str]) -> dict[str, str]:
    """Read `--set key=value` flags."""
    found: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"'{pair}' is not key=value", "--set", f"--set {key.strip() or 'window'}=VALUE")
        if key.strip() in found:
            raise UsageError(f"'{key.strip()}' is set twice", "--set", "keep one of them")
        found[key.strip()] = value.strip()
    return found


def complete_method(incomplete: str) -> list[tuple[str, str]]:
    from linearize import methods

    return [(name, methods.get(name).title()) for name in methods.names() if name.startswith(incomplete)]


def complete_option(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """`key=` for each option of the method named before."""
    from linearize import methods

    name = ctx.params.get("method") or methods.DEFAULT
    known = methods.get(name).options() if name in methods.names() else []
    return [(f"{o['key']}=", o["help"]) for o in known if f"{o['key']}=".startswith(incomplete)]


def complete_model(incomplete: str) -> list[str]:
    from linearize.conversion.sources import ALIASES

    return [alias for alias in ALIASES if alias.startswith(incomplete)]


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a .gguf file, a hub id, or an alias such as llama, qwen, smollm2.",
        autocompletion=complete_model,
        show_default=False,
    ),
]
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="A converted checkpoint's folder.", show_default=False)]
MethodName = Annotated[
    str,
    typer.Option(
        "--method", "-m", metavar="NAME", help="See: linearize methods.", autocompletion=complete_method, rich_help_panel=NEW
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="Layers to convert: all, 0-5,9, every:4 (each 4th stays), keep:25%, keep:auto:3.",
        rich_help_panel=NEW,
        show_default="those that grow",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="An option of the method; may be repeated.",
        autocompletion=complete_option,
        rich_help_panel=NEW,
        show_default=False,
    ),
]
StartFlag = Annotated[
    Start, typer.Option("--start", help="New parameters fitted to the teacher, or as the paper starts them.", rich_help_panel=NEW)
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        "--calibration", metavar="PATH", help="Text to calibrate on.", rich_help_panel=LEARN, show_default="built-in text"
    ),
]
CalibrationLength = Annotated[
    str | None,
    typer.Option(
        metavar="N", help="Tokens of its rows, as 8k: how long texts learnt slot scores and a state budget's layouts are to serve.",
        rich_help_panel=LEARN, show_default="4k",
    ),
]  # fmt: skip
StateBudget = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="Bytes of a sequence's state, as 4MB: the layout is found, by measuring each layer.",
        rich_help_panel=NEW, show_default=False,
    ),
]  # fmt: skip
HeldOut = Annotated[
    int | None,
    typer.Option(
        min=1, max=99, metavar="PERCENT", help="Documents that stay unseen, by hash.", rich_help_panel=LEARN, show_default="10"
    ),
]
DtypeFlag = Annotated[Dtype, typer.Option("--dtype", help="Storage of the weights; auto keeps the model's.", rich_help_panel=HOW)]
Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:1, mps.", rich_help_panel=HOW)]
Int8 = Annotated[bool, typer.Option("--int8", help="Weights in 8 bits (CPU): fewer bytes to read a token.", rich_help_panel=HOW)]
Compile = Annotated[
    bool,
    typer.Option("--compile", help="Compile one token's step (CPU): minutes once, then kept on disk.", rich_help_panel=HOW),
]
Seed = Annotated[int, typer.Option(metavar="N", min=0, help="Of everything random.", rich_help_panel=HOW)]
Revision = Annotated[
    str | None, typer.Option(metavar="REV", help="Branch, tag or commit on the hub.", rich_help_panel=HOW, show_default="main")
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="DIR", callback=new_folder, help="Folder to write.", rich_help_panel=OUTPUT, show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.", rich_help_panel=OUTPUT)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.", rich_help_panel=DANGEROUS)]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the model's own Python code.", rich_help_panel=DANGEROUS)
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", metavar="N", min=1, help="Longest answer.", rich_help_panel="Sampling")]
Temperature = Annotated[
    float, typer.Option("--temperature", "--temp", metavar="T", min=0.0, max=10.0, help="0 is greedy.", rich_help_panel="Sampling")
]
TopP = Annotated[
    float, typer.Option("--top-p", metavar="P", min=0.0, max=1.0, help="Nucleus; 1 is off.", rich_help_panel="Sampling")
]
SampleSeed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of the sampling.", rich_help_panel="Sampling")]
