"""How help looks: options in groups, examples at the end, plain text (rich would cost a tenth of a second)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from typer.core import TyperCommand, TyperGroup

SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
    "token_normalize_func": lambda name: name.replace("_", "-"),  # --max_tokens is --max-tokens
}
LAST = ("Output", "Dangerous", "Help")


def write_groups(formatter: Any, rows: Iterable[tuple[str, tuple[str, str]]]) -> None:
    """Write (group, record) rows, a section a group, in order of appearance; output and dangerous flags come last."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for group, record in rows:
        groups.setdefault(group, []).append(record)
    for group in sorted(groups, key=lambda name: LAST.index(name) if name in LAST else -1):
        with formatter.section(group):
            formatter.write_dl(groups[group])


def write_options(command: Any, ctx: Any, formatter: Any) -> None:
    found = []
    for param in command.get_params(ctx):
        record = param.get_help_record(ctx)
        if record is None:
            continue
        panel = "Help" if param.name == "help" else getattr(param, "rich_help_panel", None)
        name, text = record
        found.append((panel or ("Arguments" if param.param_type_name == "argument" else "Options"), (name, unescape(text))))
    write_groups(formatter, found)


def unescape(text: str) -> str:
    """Older versions of typer escape brackets for rich, drawn by it or not."""
    return text.replace("\\[", "[")


def write_examples(command: Any, formatter: Any) -> None:
    if command.epilog:
        with formatter.section("Examples"):
            for line in command.epilog.splitlines():
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")


class Verb(TyperCommand):
    """A command whose epilog is its examples, a line each."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        write_options(self, ctx, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        write_examples(self, formatter)


class Verbs(TyperGroup):
    """The list of verbs, in groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        width = formatter.width - 6 - max(len(name) for name, _ in commands)
        write_groups(
            formatter,
            [
                (getattr(command, "rich_help_panel", None) or "Commands", (name, command.get_short_help_str(width)))
                for name, command in commands
                if command is not None
            ],
        )
        write_options(self, ctx, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        write_examples(self, formatter)
