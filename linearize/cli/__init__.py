"""The command line: each verb parses, makes one library call and shows what it returns."""

from __future__ import annotations

import os
import platform
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Annotated, Any

import typer

from linearize.cli import architectures, bench, chat, convert, demo, distill, eval, export, generate, inspect, merge, methods
from linearize.cli import report as reporting
from linearize.cli.exits import Terminated, end, report
from linearize.cli.layout import SETTINGS, Verb, Verbs
from linearize.errors import Interrupted

MAKE, MEASURE, USE = "Make", "Measure", "Use"
DEBUG = "--debug"
EXAMPLES = """\
linearize demo
linearize convert smollm2
linearize distill smollm2-default
linearize chat smollm2-default-distilled"""


def build() -> typer.Typer:
    """The app with its verbs."""
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    app.callback(cls=Verbs, invoke_without_command=True, epilog=EXAMPLES, context_settings=SETTINGS)(root)

    def add(name: str, group: str, function: Callable[..., Any], examples: str) -> None:
        app.command(name, cls=Verb, rich_help_panel=group, epilog=examples, context_settings=SETTINGS)(function)

    add("demo", MAKE, demo.demo, demo.EXAMPLES)
    add("plan", MAKE, convert.plan, convert.PLAN_EXAMPLES)
    add("convert", MAKE, convert.convert, convert.EXAMPLES)
    add("distill", MAKE, distill.distill, distill.EXAMPLES)
    add("merge", MAKE, merge.merge, merge.EXAMPLES)
    add("eval", MEASURE, eval.evaluate, eval.EXAMPLES)
    add("report", MEASURE, reporting.report, reporting.EXAMPLES)
    app.add_typer(bench.app(), name="bench", rich_help_panel=MEASURE)
    add("inspect", MEASURE, inspect.inspect, inspect.EXAMPLES)
    add("architectures", MEASURE, architectures.architectures, architectures.EXAMPLES)
    add("methods", MEASURE, methods.methods, methods.EXAMPLES)
    add("chat", USE, chat.chat, chat.EXAMPLES)
    add("generate", USE, generate.generate, generate.EXAMPLES)
    add("export", USE, export.export, export.EXAMPLES)
    return app


def show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        import linearize

        others = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
        print(f"linearize {linearize.__version__} ({others}, python {platform.python_version()})")
        raise typer.Exit


def root(
    ctx: typer.Context,
    _version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")] = False,
    _debug: Annotated[bool, typer.Option(DEBUG, help="Show tracebacks and warnings; any verb takes it.")] = False,
) -> None:
    """Turn a pretrained Transformer into a linear-attention model: constant memory, the same weights."""
    if ctx.invoked_subcommand is None and not ctx.resilient_parsing:
        print(ctx.get_help())


def run(arguments: Sequence[str]) -> int:
    """Run one command line in this process; returns its exit code."""
    debug = DEBUG in arguments
    if not debug:
        hush()
    command: Any = typer.main.get_command(build())
    try:
        if (text := help_of(command, arguments)) is not None:
            print(text)
            return 0
        with command.make_context("linearize", [a for a in arguments if a != DEBUG]) as ctx:
            command.invoke(ctx)
        sys.stdout.flush()
    except typer.Exit as done:
        return done.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        return 0
    except Interrupted as stop:
        if "--resume" in stop.fix:
            stop.fix = shlex.join(["linearize", *arguments, *([] if "--resume" in arguments else ["--resume", "auto"])])
        return report(stop, debug)
    except (Exception, KeyboardInterrupt) as error:
        return report(error, debug)
    return 0


def help_of(command: Any, arguments: Sequence[str]) -> str | None:
    """Help without parsing: typer reads even `--help` through pydantic, which takes longer to import than all the rest."""
    if not any(flag in arguments for flag in SETTINGS["help_option_names"]):
        return None
    ctx = typer.Context(command, info_name="linearize", **SETTINGS)
    for word in (a for a in arguments if not a.startswith("-")):
        if not hasattr(command, "commands"):  # what follows a verb are its arguments
            break
        if word not in command.commands:
            return None
        command = command.commands[word]
        ctx = typer.Context(command, info_name=word, parent=ctx, **SETTINGS)
    return str(command.get_help(ctx))


def hush() -> None:
    """Keep warnings and bars of the libraries off stderr: an error is two lines there."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler says when it starts
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")


def terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def main() -> int:
    """The entry point: `linearize ...` and `python -m linearize ...`."""
    if "_LINEARIZE_COMPLETE" in os.environ:  # the shell asks what comes next
        build()(prog_name="linearize")
    signal.signal(signal.SIGTERM, terminate)
    code = run(sys.argv[1:])
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        end(code)
    return code
