"""linearize bench: how fast a checkpoint is, against its teacher and against what the machine can do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from linearize.cli import benched, flags
from linearize.cli import eval as measure
from linearize.cli.console import Console
from linearize.cli.layout import SETTINGS, Verb, Verbs
from linearize.errors import UsageError

EXAMPLES = """\
linearize bench prefill smollm2-default --dtype bfloat16
linearize bench decode smollm2-default --contexts 16,8k
linearize bench distill smollm2-default --sequence 1k,4k --stage attention
linearize bench load smollm2-default"""
PREFILL = """\
linearize bench prefill smollm2-default
linearize bench prefill smollm2-default --lengths 512,8k --long 128k --dtype bfloat16"""
DECODE = """\
linearize bench decode smollm2-default
linearize bench decode smollm2-default --compile --int8 --compile-teacher
linearize bench decode smollm2-default --llama-cpp SmolLM2-135M-Instruct.Q4_1.gguf"""
BATCH = """\
linearize bench batch smollm2-default
linearize bench batch smollm2-default --sizes 1,8,64 --context 2k --dtype bfloat16"""
MEMORY = """\
linearize bench memory smollm2-default
linearize bench memory smollm2-default --tokens 1k,10k"""
DISTILL = """\
linearize bench distill smollm2-default
linearize bench distill smollm2-default --sequence 1k,4k --dtype bfloat16
linearize bench distill smollm2-default --stage attention --parts ratio,profile"""
LOAD = """\
linearize bench load smollm2-default
linearize bench load smollm2-default --repeats 9 --json"""

WHAT = "What is measured"
Lengths = Annotated[str, typer.Option(metavar="N,N", help="Lengths of the text: 512,8192,32k.", rich_help_panel=WHAT)]
Repeats = Annotated[int, typer.Option(metavar="N", min=1, help="Runs of each, in turn.", rich_help_panel=WHAT)]
Steps = Annotated[int, typer.Option(metavar="N", min=1, help="Tokens decoded by each, in turn.", rich_help_panel=WHAT)]
Long = Annotated[
    str | None,
    typer.Option(metavar="N", help="Also the memory to read so many tokens.", rich_help_panel=WHAT, show_default="not measured"),
]
Chunk = Annotated[int, typer.Option(metavar="N", min=1, help="Tokens read at a time with --long.", rich_help_panel=WHAT)]
Contexts = Annotated[str, typer.Option(metavar="N,N", help="Tokens read before.", rich_help_panel=WHAT)]
Flat = Annotated[
    str, typer.Option(metavar="N,N", help="Contexts that the student alone is compared at; '' for none.", rich_help_panel=WHAT)
]
CompileTeacher = Annotated[
    bool, typer.Option("--compile-teacher", help="Also the teacher under torch.compile: minutes.", rich_help_panel=WHAT)
]
LlamaCpp = Annotated[
    Path | None,
    typer.Option("--llama-cpp", metavar="FILE", help="A GGUF file to run on llama.cpp beside it.", rich_help_panel=WHAT,
                 show_default=False),
]  # fmt: skip
Sizes = Annotated[str, typer.Option(metavar="N,N", help="Numbers of sequences.", rich_help_panel=WHAT)]
Context = Annotated[str, typer.Option(metavar="N", help="Tokens that each sequence read before.", rich_help_panel=WHAT)]
Tokens = Annotated[str, typer.Option(metavar="N,N", help="Tokens of the talk at which the peak is read.", rich_help_panel=WHAT)]
Turn = Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of a turn.", rich_help_panel=WHAT)]
Sequence = Annotated[str, typer.Option(metavar="N,N", help="Tokens of a row in training.", rich_help_panel=WHAT)]
StageFlag = Annotated[flags.StageKind, typer.Option("--stage", help="attention, lora, or both.", rich_help_panel=WHAT)]
Parts = Annotated[str, typer.Option(metavar="A,B", help="Some of: ratio, peak, lengths, profile.", rich_help_panel=WHAT)]
TeacherTo = Annotated[
    str, typer.Option("--teacher-to", metavar="N", help="The longest text that the teacher learns from.", rich_help_panel=WHAT)
]


def app() -> typer.Typer:
    """The verb with its benchmarks."""
    made = typer.Typer(rich_markup_mode=None)
    made.callback(cls=Verbs, invoke_without_command=True, epilog=EXAMPLES, context_settings=SETTINGS)(bench)
    for name, function, examples in (
        ("prefill", prefill, PREFILL), ("decode", decode, DECODE), ("batch", batch, BATCH), ("memory", memory, MEMORY),
        ("distill", distill, DISTILL), ("load", load, LOAD),
    ):  # fmt: skip
        made.command(name, cls=Verb, rich_help_panel="Benchmarks", epilog=examples, context_settings=SETTINGS)(function)
    return made


def bench(ctx: typer.Context) -> None:
    """Measure speed and memory against the teacher and the machine.

    Everything in one run: the student, its teacher on the same weights, and what the machine can do. Times are
    medians of runs in turn, with their quartiles; matmul, memory and calls are the shares of the time that matrix
    products, reading the weights and calling operators would take alone.
    """
    if ctx.invoked_subcommand is None and not ctx.resilient_parsing:
        print(ctx.get_help())


def shown(run: Callable[..., dict[str, Any]], as_json: bool, *args: Any, **settings: Any) -> None:
    """Run a benchmark, and show what it found."""
    console = Console(as_json)
    with console.progress() as progress:
        found = run(*args, progress=progress, **settings)
    benched.benchmark(console, found)
    console.data(found)


def some(text: str, flag: str) -> list[int]:
    """At least one number of tokens, the smallest first."""
    if not (found := flags.counts(text)):
        raise typer.BadParameter(f"{flag} needs a number of tokens such as 1k")
    return found


def prefill(
    directory: flags.Directory,
    lengths: Lengths = "512,1024,2048,4096,8192",
    long: Long = None,
    chunk: Chunk = 1024,
    repeats: Repeats = 3,
    dtype: flags.DtypeFlag = flags.Dtype.auto,
    device: flags.Device = "auto",
    as_json: flags.Json = False,
) -> None:
    """Time to read a text: student, teacher, and the network without attention."""
    from linearize.benchmarks.prefill import bench_prefill

    shown(
        bench_prefill, as_json, directory, lengths=some(lengths, "--lengths"), long=flags.count(long) if long else 0, chunk=chunk,
        repeats=repeats, dtype=dtype.value, device=device,
    )  # fmt: skip


def decode(
    directory: flags.Directory,
    contexts: Contexts = "16,2048,8192",
    flat: Flat = "100,1k,10k,100k",
    steps: Steps = 20,
    compiled: flags.Compile = False,
    int8: flags.Int8 = False,
    compile_teacher: CompileTeacher = False,
    llama_cpp: LlamaCpp = None,
    dtype: flags.DtypeFlag = flags.Dtype.auto,
    device: flags.Device = "auto",
    as_json: flags.Json = False,
) -> None:
    """Time to write a token after contexts of several lengths, student and teacher."""
    from linearize.benchmarks.decode import bench_decode

    shown(
        bench_decode, as_json, directory, contexts=some(contexts, "--contexts"), flat=flags.counts(flat), steps=steps,
        compile_student=compiled, int8=int8, compile_teacher=compile_teacher, llama_cpp_file=llama_cpp, dtype=dtype.value,
        device=device,
    )  # fmt: skip


def batch(
    directory: flags.Directory,
    sizes: Sizes = "1,2,4,8,16,32,64",
    context: Context = "8192",
    steps: Steps = 5,
    dtype: flags.DtypeFlag = flags.Dtype.auto,
    device: flags.Device = "auto",
    as_json: flags.Json = False,
) -> None:
    """Tokens a second of many sequences at once, and their memory."""
    from linearize.benchmarks.batch import bench_batch

    shown(
        bench_batch, as_json, directory, sizes=some(sizes, "--sizes"), context=some(context, "--context")[0], steps=steps,
        dtype=dtype.value, device=device,
    )  # fmt: skip


def memory(
    directory: flags.Directory,
    tokens: Tokens = "1k,100k",
    turn: Turn = 128,
    dtype: flags.DtypeFlag = flags.Dtype.auto,
    device: flags.Device = "auto",
    as_json: flags.Json = False,
) -> None:
    """Peak memory of a talk after a few tokens and after many."""
    from linearize.benchmarks.talk import bench_memory

    shown(bench_memory, as_json, directory, tokens=some(tokens, "--tokens"), turn=turn, dtype=dtype.value, device=device)


def distill(
    directory: flags.Directory,
    sequence: Sequence = "1024",
    stage: StageFlag = flags.StageKind.all,
    parts: Parts = "ratio,peak,lengths,profile",
    lengths: Lengths = "1024,4096,16384,32768",
    teacher_to: TeacherTo = "8192",
    repeats: Repeats = 3,
    dtype: flags.DtypeFlag = flags.Dtype.auto,
    device: flags.Device = "auto",
    as_json: flags.Json = False,
) -> None:
    """Training against what it would cost without conversion: throughput, memory, by length, by operator."""
    from linearize.benchmarks.distill import KINDS, PARTS, bench_distill

    wanted = measure.words(parts)
    if unknown := [part for part in wanted if part not in PARTS]:
        raise UsageError(f"unknown part '{unknown[0]}'", "--parts", f"some of: {', '.join(PARTS)}")
    if stage is flags.StageKind.long:
        raise UsageError("stage long is LoRA on longer rows", "--stage long", "--stage lora --sequence 4k")
    shown(
        bench_distill, as_json, directory, sequences=some(sequence, "--sequence"),
        kinds=KINDS if stage is flags.StageKind.all else (stage.value,), parts=wanted, lengths=some(lengths, "--lengths"),
        teacher_to=flags.count(teacher_to), repeats=repeats, dtype=dtype.value, device=device,
    )  # fmt: skip


def load(
    directory: flags.Directory,
    repeats: Repeats = 5,
    dtype: flags.DtypeFlag = flags.Dtype.auto,
    device: flags.Device = "auto",
    as_json: flags.Json = False,
) -> None:
    """Time to load a checkpoint against the original's, and to start commands."""
    from linearize.benchmarks.loading import bench_load

    shown(bench_load, as_json, directory, repeats=repeats, dtype=dtype.value, device=device)
