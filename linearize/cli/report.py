"""linearize report: a page, a model card and the figures of one checkpoint, or several side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linearize.cli import eval as measure
from linearize.cli import flags, measured
from linearize.cli.console import Console
from linearize.errors import UsageError

EXAMPLES = """\
linearize report smollm2-default-distilled
linearize report smollm2-default-distilled --tokens 64k --recall-lengths 1k,2k,4k --recall-samples 4
linearize report --compare smollm2-default smollm2-liger smollm2-lolcats -o three.html"""

Directories = Annotated[list[Path], typer.Argument(metavar="DIR...", help="Converted checkpoints' folders.", show_default=False)]
Compare = Annotated[
    bool,
    typer.Option("--compare", help="Several side by side; what was measured before is used again.", rich_help_panel=measure.WHAT),
]
Page = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="The page.",
        rich_help_panel=flags.OUTPUT,
        show_default="DIR/report.html, of several DIR/comparison.html",
    ),
]


def report(
    directories: Directories,
    compare: Compare = False,
    data: measure.Data = None,
    held_out: measure.HeldOut = None,
    tokens: measure.Tokens = "16384",
    length: measure.Length = "8192",
    teacher: measure.Teacher = None,
    recall: measure.Recall = True,
    recall_tasks: measure.RecallTasks = None,
    recall_lengths: measure.RecallLengths = "512,1024",
    recall_depths: measure.Depths = "0.25,0.75",
    recall_samples: measure.RecallSamples = 2,
    speed: measure.Speed = True,
    samples: measure.Samples = True,
    tasks: measure.Tasks = None,
    task_folder: measure.TaskFolder = None,
    limit: measure.Limit = None,
    output: Page = None,
    seed: flags.Seed = 0,
    dtype: measure.Dtype = flags.Dtype.auto,
    device: flags.Device = "auto",
    as_json: flags.Json = False,
) -> None:
    """Measure a checkpoint and write what was found: a page, its model card, evaluation.json.

    The page is one file that needs no network. The model card keeps all that is not between our marks.
    """
    from linearize.evaluation.plots import need_plots
    from linearize.pipeline import report as run

    if len(directories) > 1 and not compare:
        raise UsageError(f"{len(directories)} folders", "report", "--compare lays them side by side")
    console = Console(as_json)
    need_plots()
    grid = measure.asked(recall, recall_tasks, recall_lengths, recall_depths, recall_samples, seed)
    with console.progress() as progress:
        found = run(
            directories, output=output, again=not compare, progress=progress, data=data, held_out=held_out,
            tokens=flags.count(tokens), length=flags.count(length), teacher=teacher, recall=grid, samples=samples,
            speed=None if speed else (), tasks=measure.words(tasks), limit=limit, task_folder=task_folder, seed=seed,
            dtype=dtype.value, device=device,
        )  # fmt: skip
    for evaluation in found["evaluations"]:
        measured.evaluation(console, evaluation)
        console.say()
    console.facts([("page", found["page"]), *(("model card", card) for card in found["cards"])])
    console.data(found)
