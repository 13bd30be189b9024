"""linearize export: a checkpoint as a model that other software knows."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from linearize.cli import flags
from linearize.cli.console import Console
from linearize.ranges import span

EXAMPLES = """\
linearize export qwen3-gated-deltanet --to transformers
linearize export smollm2-mamba2 --to transformers -o smollm2-granite --dtype bfloat16"""


WITHOUT_CACHE = "generate() runs without a cache there: that of transformers needs a kept softmax layer (convert --layers)"


class Target(str, Enum):
    """What has the model class."""

    transformers = "transformers"
    fla = "fla"


To = Annotated[Target, typer.Option("--to", help="Whose model class.", rich_help_panel=flags.NEW)]


def export(
    directory: flags.Directory,
    to: To = Target.transformers,
    dtype: flags.DtypeFlag = flags.Dtype.auto,
    output: flags.Output = None,
    as_json: flags.Json = False,
    overwrite: flags.Overwrite = False,
) -> None:
    """Write a checkpoint as a model that other software knows.

    It then loads without linearize and without custom code. gated-deltanet on Qwen3, and mamba2 on Llama, Mistral or
    Granite, both with --set native=true, are layers of transformers too; fla has gated-deltanet where all layers are
    converted. Anything else is refused with the reason. Both models run on the same text first, and nothing is written
    if their logits differ.
    """
    from linearize.conversion.export import export as run

    console = Console(as_json)
    with console.progress() as progress:
        made = run(directory, to=to.value, output=output, dtype=dtype.value, overwrite=overwrite, progress=progress)
    layers = f"{span(made.layers)} recurrent, {span(made.kept) or 'none'} softmax"
    compared = "not compared: its kernels need a GPU"
    if made.difference is not None:
        compared = f"{made.difference:.0e} relative RMSE against linearize's, in float32"
    console.facts(
        [
            ("model", f"{made.model_type}  {made.dtype}  needs {made.requires}"),
            ("layers", layers),
            ("logits", compared),
            ("note", "" if made.kept or to is Target.fla else WITHOUT_CACHE),
        ]
    )
    console.say(f"\nsaved    {made.path}")
    console.data(made.to_dict())
