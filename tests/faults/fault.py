"""A fault: something spoiled in the current folder, a command, and the one clear error that must come of it."""

from __future__ import annotations

import json
import re
import shlex
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.tiny import Cli, Outcome, tree

Spoil = Callable[[], object]


@dataclass(frozen=True)
class Fault:
    """`line` is a pattern of the error's first line, `fix` a part of the second."""

    name: str
    code: int
    line: str
    command: str
    spoil: Spoil = lambda: None
    fix: str = ""


def trial(fault: Fault, cli: Cli) -> None:
    """Spoil, run, and hold the outcome against the fault; no file may change."""
    fault.spoil()
    before = tree(Path())
    check(cli(*shlex.split(fault.command)), fault.code, fault.line, fault.fix)
    assert tree(Path()) == before


def check(done: Outcome, code: int, line: str, fix: str = "") -> None:
    """Two lines at the end of stderr (steps may be named before them), the code, no traceback, no half an output."""
    assert "Traceback" not in done.err
    lines = done.err.splitlines()
    steps, (first, second) = lines[:-2], lines[-2:]
    assert all(re.fullmatch(r"(load|save|calibrate|distill|evaluate)\b.*", step) for step in steps), done.err
    assert first.startswith("error: "), done.err
    assert re.search(line, first), done.err
    assert re.fullmatch(r"fix: \S.*", second), done.err
    assert fix in second
    assert done.code == code, done.err
    assert done.out == ""
    assert not list(Path().glob("*.tmp-*"))


def write(path: str, content: bytes) -> Spoil:
    def spoil() -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content)

    return spoil


def remove(path: str) -> Spoil:
    return lambda: Path(path).unlink()


def edit(path: str, **changes: Any) -> Spoil:
    """Change keys of a JSON file."""

    def spoil() -> None:
        found = json.loads(Path(path).read_text())
        Path(path).write_text(json.dumps({**found, **changes}))

    return spoil


def config(**changes: Any) -> Spoil:
    return edit("tiny/config.json", **changes)


def weights(content: bytes) -> Spoil:
    return write("tiny/model.safetensors", content)


def header(text: bytes) -> Spoil:
    """A safetensors file of a header alone."""
    return weights(struct.pack("<Q", len(text)) + text)


def truncate(path: str) -> Spoil:
    return lambda: write(path, Path(path).read_bytes()[:-1])()


def link(path: str) -> Spoil:
    """In place of a file, a link to it elsewhere."""

    def spoil() -> None:
        away = Path(path).rename(Path("away").absolute())
        Path(path).symlink_to(away)

    return spoil


def rewrite_header(change: Callable[[dict[str, Any]], None]) -> Spoil:
    """The model's weights with another header before the same bytes."""

    def spoil() -> None:
        path = Path("tiny/model.safetensors")
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        found = json.loads(data[8 : 8 + length])
        change(found)
        text = json.dumps(found).encode().ljust(length)
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return spoil


def shorten_first(found: dict[str, Any]) -> None:
    """One tensor's bytes end early, so that a hole follows."""
    next(entry for name, entry in found.items() if name != "__metadata__")["data_offsets"][1] -= 4


def lose_a_shard() -> None:
    """An index that names two shards of which one is there."""
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    Path("tiny/model.safetensors").rename(f"tiny/{first}")
    Path("tiny/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": first, "b": second}}))


def bare() -> None:
    """A model without any of its tokenizer's files."""
    for path in Path("tiny").glob("*token*"):
        path.unlink()


def pickle_only() -> None:
    """Weights that would run a command when unpickled."""
    Path("tiny/model.safetensors").unlink()
    Path("tiny/pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")


def plan(**changes: Any) -> Spoil:
    """A checkpoint whose plan was edited, with a manifest that agrees."""

    def spoil() -> None:
        from linearize.checkpoint import write_manifest

        path = Path("tiny-default/config.json")
        found = json.loads(path.read_text())
        path.write_text(json.dumps({**found, "linearize": {**found["linearize"], **changes}}))
        write_manifest(path.parent)

    return spoil


def tamper() -> None:
    """Other bytes of the same length in the weights."""
    path = Path("tiny-default/model.safetensors")
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\1\0")
