"""Help: quick because it imports nothing heavy, complete, and in groups."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cli.tiny import Cli, environment, spawn

VERBS = [
    "demo",
    "plan",
    "convert",
    "distill",
    "merge",
    "eval",
    "report",
    "bench",
    "inspect",
    "architectures",
    "methods",
    "chat",
    "generate",
    "export",
]
HEAVY = ("torch", "transformers", "rich", "numpy", "huggingface_hub", "peft", "accelerate", "pydantic")
PROBE = (
    "import sys; from linearize.cli import run; run(sys.argv[1:]); print('LOADED', *sorted({m.split('.')[0] for m in sys.modules}))"
)


def loaded(*arguments: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, env=environment(), check=True)
    return set(done.stdout.rpartition("LOADED")[2].split())


@pytest.mark.parametrize(
    "arguments", [["--help"], ["convert", "--help"], ["chat", "-h"], ["bench", "decode", "--help"], []], ids=" ".join
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    heavy = set(HEAVY) if arguments else set(HEAVY) - {"pydantic"}  # typer parses with it, where help is not asked for
    assert not loaded(*arguments) & heavy


@pytest.mark.parametrize("arguments", [["methods", "--json"], ["--version"]], ids=" ".join)
def test_torch_stays_out_of_what_reads_names_only(arguments: list[str]) -> None:
    assert not loaded(*arguments) & {"torch", "transformers"}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_examples_that_start_with_it(cli: Cli, verb: str) -> None:
    done = cli(verb, "--help")
    assert done.code == 0
    examples = done.out.split("Examples:")[1]
    assert 2 <= examples.count(f"linearize {verb}") <= 5


def test_help_shows_groups_and_defaults(cli: Cli) -> None:
    done = cli("convert", "--help")
    for part in ("What becomes of it:", "How it runs:", "Output:", "Dangerous:", "[default: default]", "[default: calibrated]"):
        assert part in done.out
    assert done.out.index("Output:") < done.out.index("Dangerous:")


def test_the_list_of_verbs(cli: Cli) -> None:
    done = cli("--help")
    assert done.code == 0
    assert all(f"\n  {verb} " in done.out for verb in VERBS)
    assert cli().out == done.out


def test_version(cli: Cli) -> None:
    done = cli("--version")
    assert done.code == 0
    assert done.out.startswith("linearize ")
    assert "torch 2" in done.out


def test_module_runs_as_torchrun_starts_it() -> None:
    assert spawn("--version").stdout.startswith("linearize ")


def test_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{sys.executable} -m linearize methods --json | head -c 1"],
        capture_output=True, text=True, env=environment(), check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "[", "")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("linearize con", {"convert"}),
        ("linearize convert smollm2 --method lol", {"lola", "lolcats"}),
        ("linearize convert smollm2 --method liger --set near", {"near_weight="}),
        ("linearize convert smol", {"smollm2"}),
        ("linearize methods hedge", {"hedgehog"}),
    ],
)
def test_completion(words: str, expected: set[str]) -> None:
    position = str(len(words.split()) - 1)
    settings = {"_LINEARIZE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": position}
    code = "import sys; sys.argv[0] = 'linearize'; from linearize.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(**settings), check=False)
    assert set(done.stdout.split(os.linesep)) - {""} == expected
