"""Checkpoints are written aside, made durable, given their manifest last, and only then renamed into place."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from linearize.errors import IntegrityError, ResourceError, UsageError

MANIFEST, CARD = "linearize.json", "README.md"  # the card is the user's to edit: it may differ


def check_target(output: Path, overwrite: bool, source: Path | None = None) -> None:
    """Refuse an output folder that holds something, or that is the source or lies inside it (UsageError).

    `overwrite` is for folders that have a manifest: others hold what linearize did not write.
    """
    where = output.resolve()
    if source is not None and (where == source or source in where.parents):
        raise UsageError("the output is the source folder or lies inside it", str(output), "choose another folder with -o")
    if output.is_file():
        raise UsageError("the output is a file", str(output), "choose a folder with -o")
    if output.is_dir() and any(output.iterdir()):
        ours, files = (output / MANIFEST).is_file(), sum(1 for p in output.rglob("*") if p.is_file())
        if not overwrite:
            fix = f"--overwrite, or -o {output}-2" if ours else f"-o {output}-2"
            raise UsageError(f"the output folder exists ({files} files)", str(output), fix)
        if not ours:
            what = f"--overwrite deletes checkpoints only, and the output folder is none ({files} files)"
            raise UsageError(what, str(output), f"-o {output}-2")
    parent = next(p for p in (where, *where.parents) if p.exists())
    if not parent.is_dir():
        raise UsageError("the output would lie in a file", str(parent), "choose another folder with -o")
    if not os.access(parent, os.W_OK):
        raise ResourceError("the output folder cannot be written", str(parent), "choose another folder with -o")


def check_space(output: Path, needed: int) -> None:
    """ResourceError if the disk has fewer than `needed` bytes free."""
    parent = next(p for p in (output.resolve(), *output.resolve().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ResourceError(f"need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB free", str(parent), "choose another disk with -o")


@contextmanager
def staged(output: Path, overwrite: bool = False, **facts: Any) -> Iterator[Path]:
    """A folder to fill; on success it gets its manifest (with `facts`) and becomes `output`, on failure it vanishes."""
    output.parent.mkdir(parents=True, exist_ok=True)
    stage = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    try:
        yield stage
        write_manifest(stage, **facts)
        for path in (*stage.rglob("*"), stage):
            _sync(path)
        _move(stage, output, overwrite)
        _sync(output.parent)
    except OSError as error:
        if error.errno in (28, 122):  # no space, quota
            raise ResourceError(
                "the disk is full", str(output.parent), "free some space, or choose another disk with -o"
            ) from error
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _move(stage: Path, output: Path, overwrite: bool) -> None:
    if not output.exists():
        stage.rename(output)
        return
    if any(output.iterdir()) and not overwrite:
        raise UsageError("the output folder exists", str(output), "--overwrite, or another folder with -o")
    old = output.with_name(f"{output.name}.old-{os.getpid()}")
    output.rename(old)
    stage.rename(output)
    shutil.rmtree(old)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    total = hashlib.sha256()
    while block := file.read(1 << 20):
        total.update(block)
    return total.hexdigest()


def write_manifest(directory: Path, **facts: Any) -> None:
    """Size and SHA-256 of every file, written last: a folder without it is not a whole checkpoint."""
    files = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": digest(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    text = json.dumps({**facts, "files": files}, indent=2, sort_keys=True)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, with names held inside the folder. IntegrityError if it is missing or unsafe."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        names = list(manifest["files"])
    except FileNotFoundError:
        raise IntegrityError(
            f"{MANIFEST} is missing: this is not a whole linearized checkpoint", str(directory), "linearize convert MODEL"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise IntegrityError(f"{MANIFEST} cannot be read", str(directory), "write the checkpoint again") from None
    root = directory.resolve()
    for name in names:
        path = root / name
        inside = path.parent == root and path.name != ".."  # of itself, unless it is a link
        if path.is_symlink() or not (inside or root in path.resolve().parents):
            raise IntegrityError(
                f"{MANIFEST} names a file outside the folder: {name}", str(directory), "do not use this checkpoint"
            )
    return manifest  # type: ignore[no-any-return]


def verify(directory: Path, hashes: bool = True) -> dict[str, Any]:
    """The manifest, once every file has the size (and hash) it names. IntegrityError names the first that differs."""
    manifest = read_manifest(directory)
    for name, entry in manifest["files"].items():
        if name == CARD:
            continue
        path = directory / name
        if not path.is_file():
            raise IntegrityError(f"file '{name}' is missing", str(directory), "write the checkpoint again")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise IntegrityError(
                f"{name} is truncated or changed: {size} of {entry['bytes']} bytes", str(directory), "write the checkpoint again"
            )
        if hashes and digest(path) != entry["sha256"]:
            raise IntegrityError(f"file '{name}' hash differs", str(directory), "write the checkpoint again")
    return manifest


def read_config(path: Path) -> dict[str, Any]:
    """A config.json; IntegrityError where it is missing or not JSON."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IntegrityError("config.json is missing", str(path.parent), "pass the folder that holds config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise IntegrityError("config.json is not JSON", str(path), "download it again") from None
    if not isinstance(config, dict):
        raise IntegrityError("config.json is not an object", str(path), "download it again")
    return config
