"""linearize distill: teach the mixers what the softmax layers did."""

from __future__ import annotations

import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from linearize.cli import flags, show
from linearize.cli.console import Console
from linearize.errors import UsageError

EXAMPLES = """\
linearize distill smollm2-default
linearize distill smollm2-default --data chats.jsonl --data teacher --recall 0.05 --tokens 2M -o taught
linearize distill smollm2-default --recipe recipe.yaml --set stages.lora.targets=q,v
linearize distill smollm2-default --resume auto --num-processes 2
linearize distill smollm2-default --stage long --set stages.long.sequence=32768 --num-processes 8 --sequence-parallel"""

Data = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SOURCE",
        help="A .txt, .jsonl or .parquet file, a folder, a hub data set, builtin, or teacher (sampled from it); may be repeated.",
        rich_help_panel=flags.LEARN, show_default="builtin",
    ),
]  # fmt: skip
RecipeFile = Annotated[
    Path | None,
    typer.Option("--recipe", metavar="FILE", help="A recipe in YAML.", rich_help_panel=flags.LEARN, show_default="the method's"),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Over the recipe, as stages.lora.rank=4; may be repeated.", rich_help_panel=flags.LEARN,
        show_default=False,
    ),
]  # fmt: skip
Recall = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=0.9,
        metavar="SHARE",
        help="Share of rows that ask for what was hidden.",
        rich_help_panel=flags.LEARN,
        show_default="0",
    ),
]
Tokens = Annotated[
    str | None,
    typer.Option(metavar="N", help="Tokens a stage: 200000, 200k, 2M.", rich_help_panel=flags.LEARN, show_default="the recipe's"),
]
Stage = Annotated[
    flags.StageKind,
    typer.Option(help="Which stages to run; all leaves out long unless the recipe has it.", rich_help_panel=flags.LEARN),
]
Sequence = Annotated[
    int | None, typer.Option(min=8, metavar="N", help="Tokens a sequence.", rich_help_panel=flags.LEARN, show_default="1024")
]
Batch = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Sequences a step and process.", rich_help_panel=flags.LEARN, show_default="1"),
]
Seed = Annotated[
    int | None, typer.Option(metavar="N", min=0, help="Of everything random.", rich_help_panel=flags.HOW, show_default="0")
]
Merge = Annotated[
    bool, typer.Option("--merge/--no-merge", help="Add the adapter into the weights, or keep it in DIR/adapter.",
                       rich_help_panel=flags.OUTPUT),
]  # fmt: skip
SaveEvery = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Steps from save to save.", rich_help_panel=flags.HOW, show_default="five minutes"),
]
Keep = Annotated[int, typer.Option(min=1, metavar="N", help="Saved states that stay until the end.", rich_help_panel=flags.HOW)]


class Precision(str, Enum):
    """What gathered weights and activations are in."""

    bfloat16 = "bfloat16"


Processes = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Start N processes, through torchrun.", rich_help_panel=flags.HOW, show_default="as launched"
    ),
]


Shard = Annotated[bool, typer.Option("--shard", help="Spread the frozen weights over the processes.", rich_help_panel=flags.HOW)]
SequenceParallel = Annotated[
    bool,
    typer.Option("--sequence-parallel", help="All processes share each row, for rows too long for one.", rich_help_panel=flags.HOW),
]
MixedPrecision = Annotated[
    Precision | None,
    typer.Option(help="Of sharded weights in use.", rich_help_panel=flags.HOW, show_default="as stored"),
]
Checkpointing = Annotated[
    bool,
    typer.Option("--gradient-checkpointing", help="Less memory, one more forward pass.", rich_help_panel=flags.HOW),
]
StreamLayers = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="K", help="Stage attention K layers at a time: a model larger than memory.", rich_help_panel=flags.HOW,
        show_default="all at once",
    ),
]  # fmt: skip
StreamCache = Annotated[
    float | None,
    typer.Option(
        min=0, metavar="GB", help="Disk that --stream-layers may fill with layer inputs.", rich_help_panel=flags.HOW,
        show_default="half of what is free",
    ),
]  # fmt: skip


ReportTo = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TRACKER", help="tensorboard, wandb, trackio, …; may be repeated.", rich_help_panel=flags.OUTPUT, show_default=False
    ),
]


class Resume(str, Enum):
    """Whether an interrupted run goes on."""

    never = "never"
    auto = "auto"


ResumeFlag = Annotated[Resume, typer.Option("--resume", help="auto: go on where a run stopped.", rich_help_panel=flags.HOW)]


def distill(
    directory: flags.Directory,
    data: Data = None,
    recall: Recall = None,
    held_out: flags.HeldOut = None,
    tokens: Tokens = None,
    stage: Stage = flags.StageKind.all,
    recipe: RecipeFile = None,
    sets: Set = None,
    sequence: Sequence = None,
    batch: Batch = None,
    save_every: SaveEvery = None,
    keep: Keep = 2,
    resume: ResumeFlag = Resume.never,
    seed: Seed = None,
    device: flags.Device = "auto",
    num_processes: Processes = None,
    shard: Shard = False,
    mixed_precision: MixedPrecision = None,
    gradient_checkpointing: Checkpointing = False,
    sequence_parallel: SequenceParallel = False,
    stream_layers: StreamLayers = None,
    stream_cache: StreamCache = None,
    report_to: ReportTo = None,
    output: flags.Output = None,
    merge: Merge = True,
    as_json: flags.Json = False,
    overwrite: flags.Overwrite = False,
) -> None:
    """Teach a converted checkpoint what its softmax layers did.

    Stage attention fits each layer to the teacher's; stage lora trains an adapter against the teacher's
    logits and merges it; stage long goes on with the text alone, in longer sequences. The teacher is the
    same network with its mixers off. Writes DIR-distilled unless -o says otherwise.
    """
    if stream_cache is not None and stream_layers is None:
        raise UsageError("there are no layer inputs on disk without --stream-layers", "--stream-cache", "add --stream-layers K")
    if num_processes is not None:
        launch(num_processes)
    from linearize.distillation.collectives import leave
    from linearize.distillation.run import distill as run
    from linearize.distillation.streaming import Streaming
    from linearize.recipe import read

    console = Console(as_json)
    with console.progress() as progress:
        made = run(
            directory, data=data, recall=recall, held_out=held_out, tokens=flags.count(tokens) if tokens else None,
            stage=stage.value, output=output, recipe=read(recipe) if recipe else None, sets=sets or (), merge=merge,
            resume=resume is Resume.auto, save_every=save_every, keep=keep, report_to=report_to or (), shard=shard,
            precision=mixed_precision.value if mixed_precision else None, gradient_checkpointing=gradient_checkpointing,
            sequence_parallel=sequence_parallel,
            streaming=None if stream_layers is None else Streaming(stream_layers, stream_cache),
            seed=seed, sequence=sequence, batch=batch, device=device, overwrite=overwrite, progress=progress,
        )  # fmt: skip
    leave()
    if not made.is_main:
        return
    found = made.to_dict()
    show.stages(console, found["stages"])
    console.say(f"\nsaved    {made.path}")
    if made.sampled is not None:
        console.say(f"text     {made.sampled}, which --data takes too")
    verbs = ("eval", "chat") if made.causal else ("inspect",)
    console.say("next     " + "\n         ".join(f"linearize {verb} {made.path}" for verb in verbs))
    console.data(found)


def launch(processes: int) -> None:
    """Become torchrun with so many processes of this command; nothing where they run already. UsageError if they are others."""
    running = os.environ.get("WORLD_SIZE")
    if running == str(processes):
        return
    if running is not None:
        raise UsageError(
            f"{running} processes were launched", f"--num-processes {processes}", f"--num-processes {running}, or none"
        )
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    os.execv(sys.executable, [*torchrun, "-m", "linearize", *sys.argv[1:]])
