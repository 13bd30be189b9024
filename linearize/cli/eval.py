"""linearize eval: how close the student is to its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from linearize.cli import flags, measured
from linearize.cli.console import Console

EXAMPLES = """\
linearize eval smollm2-default-distilled
linearize eval smollm2-default-distilled --data book.txt --tokens 32k --length 8k
linearize eval smollm2-default --no-recall --no-speed --json
linearize eval smollm2-default --recall-tasks pass-key,s-niah-2 --recall-lengths 1k,2k,4k --recall-samples 4
linearize eval smollm2-default --tasks hellaswag,arc_easy --limit 100"""

WHAT = "What is measured"
Data = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE", help="A text file, a folder, a hub data set.", rich_help_panel=WHAT, show_default="held-out built-in text"
    ),
]
HeldOut = Annotated[
    int | None,
    typer.Option(
        min=1, max=100, metavar="PERCENT", help="Documents to measure on, by their hash; 100 takes all.", rich_help_panel=WHAT,
        show_default="those never trained on",
    ),
]  # fmt: skip
Dtype = Annotated[flags.Dtype, typer.Option(help="What to compute in; auto takes the checkpoint's.", rich_help_panel=flags.HOW)]
Tokens = Annotated[str, typer.Option(metavar="N", help="Tokens to measure on: 8192, 32k.", rich_help_panel=WHAT)]
Length = Annotated[str, typer.Option(metavar="N", help="How far into a document, in tokens.", rich_help_panel=WHAT)]
Teacher = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="The model to compare with.", rich_help_panel=WHAT, show_default="the one converted"),
]
Recall = Annotated[bool, typer.Option("--recall/--no-recall", help="Also ask for what stands far back.", rich_help_panel=WHAT)]
RecallTasks = Annotated[
    str | None,
    typer.Option(metavar="A,B", help="Forms of recall: pass-key, s-niah-1, mqar, …", rich_help_panel=WHAT, show_default="all"),
]
RecallLengths = Annotated[str, typer.Option(metavar="N,N", help="Lengths of its prompts.", rich_help_panel=WHAT)]
RecallSamples = Annotated[int, typer.Option(metavar="N", min=1, help="Prompts for each length and depth.", rich_help_panel=WHAT)]
Depths = Annotated[str, typer.Option(metavar="X,X", help="Where it stands: 0 start, 1 end.", rich_help_panel=WHAT)]
Speed = Annotated[bool, typer.Option("--speed/--no-speed", help="Also time reading and writing.", rich_help_panel=WHAT)]
Samples = Annotated[bool, typer.Option("--samples/--no-samples", help="Also continue some texts.", rich_help_panel=WHAT)]
Tasks = Annotated[
    str | None,
    typer.Option(metavar="A,B", help="Tasks of lm-evaluation-harness.", rich_help_panel=WHAT, show_default=False),
]
TaskFolder = Annotated[
    Path | None, typer.Option(metavar="DIR", help="YAML tasks of your own.", rich_help_panel=WHAT, show_default=False)
]
Limit = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Examples of each task.", rich_help_panel=WHAT, show_default="all")
]


def evaluate(
    directory: flags.Directory,
    data: Data = None,
    held_out: HeldOut = None,
    tokens: Tokens = "16384",
    length: Length = "8192",
    teacher: Teacher = None,
    recall: Recall = True,
    recall_tasks: RecallTasks = None,
    recall_lengths: RecallLengths = "512,1024",
    recall_depths: Depths = "0.25,0.75",
    recall_samples: RecallSamples = 2,
    speed: Speed = True,
    samples: Samples = True,
    tasks: Tasks = None,
    task_folder: TaskFolder = None,
    limit: Limit = None,
    seed: flags.Seed = 0,
    dtype: Dtype = flags.Dtype.auto,
    device: flags.Device = "auto",
    as_json: flags.Json = False,
) -> None:
    """Measure a checkpoint against its teacher.

    The teacher, the student, the student with parts switched off, and the window that its state's bytes
    would buy, on the same tokens: perplexity by position, agreement, recall, speed.
    """
    from linearize.pipeline import evaluate as run

    console = Console(as_json)
    grid = asked(recall, recall_tasks, recall_lengths, recall_depths, recall_samples, seed)
    with console.progress() as progress:
        found = run(
            directory, data=data, held_out=held_out, tokens=flags.count(tokens), length=flags.count(length), teacher=teacher,
            recall=grid, samples=samples, speed=None if speed else (), tasks=words(tasks), limit=limit, task_folder=task_folder,
            seed=seed, dtype=dtype.value, device=device, progress=progress,
        ).to_dict()  # fmt: skip
    measured.evaluation(console, found)
    console.data(found)


def words(text: str | None) -> tuple[str, ...]:
    """The parts of `a,b`."""
    return tuple(part for part in (text or "").replace(" ", "").split(",") if part)


def asked(recall: bool, tasks: str | None, lengths: str, depths: str, samples: int, seed: int) -> Any:
    """The grid of recall that the flags tell, or False."""
    from linearize.evaluation.recall import TASKS, Grid

    if not recall:
        return False
    try:
        places = tuple(float(x) for x in words(depths))
    except ValueError:
        raise typer.BadParameter(f"'{depths}' are not depths such as 0.1,0.5,0.9") from None
    if not places or any(not 0 <= x <= 1 for x in places):
        raise typer.BadParameter(f"'{depths}' are not depths between 0 and 1")
    return Grid(words(tasks) or TASKS, tuple(flags.count(x) for x in words(lengths)), places, samples, seed)
