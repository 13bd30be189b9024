"""Weight files checked by their headers, before anything is loaded."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linearize.errors import IntegrityError

MAX_HEADER = 100_000_000
AGAIN = "delete it and download it again"


def safetensors_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, with its offsets held against the file's size. IntegrityError names what is wrong."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise IntegrityError(f"{path.name} is truncated: {size} bytes", str(path), AGAIN)
        (length,) = struct.unpack("<Q", start)
        if length > min(MAX_HEADER, size):
            text = start.decode("latin-1")
            what = f'{path.name} is not safetensors (starts with "{text}")' if text.isprintable() else f"{path.name} header is invalid"
            raise IntegrityError(what, str(path), AGAIN)
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise IntegrityError(f"{path.name} header is not JSON", str(path), AGAIN) from None
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"][0]):
        first, last = entry["data_offsets"]
        if first != end or last < first:
            raise IntegrityError(f"{path.name} header invalid: offsets of '{name}' leave a hole or overlap", str(path), AGAIN)
        end = last
    if size != 8 + length + end:
        raise IntegrityError(f"{path.name} is truncated: {size} of {8 + length + end} bytes", str(path), AGAIN)
    return tensors


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, by its index where there is one, never by glob. IntegrityError if some are missing."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise IntegrityError(f"{index.name} is not a weight index", str(index), AGAIN) from None
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            present = len(names) - len(missing)
            raise IntegrityError(f"index names {len(names)} files, {present} present: missing {missing[0]}", str(directory), "download it again")
        return [directory / name for name in names]
    if single.exists():
        return [single]
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
        raise IntegrityError("only pickle weights found; refusing to execute them", str(directory), "save the model as safetensors first")
    raise IntegrityError("no weights found (model.safetensors)", str(directory), "pass the folder that holds the weights")


def check_weights(directory: Path, config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Every weight file's header, and the embedding's shape against the config. Returns tensor shapes."""
    shapes = {name: entry["shape"] for path in weight_files(directory) for name, entry in safetensors_header(path).items()}
    for name, shape in shapes.items():
        expected = [config.get("vocab_size"), config.get("hidden_size")]
        if name.endswith("embed_tokens.weight") and None not in expected and shape != expected:
            got, want = "×".join(map(str, shape)), "×".join(map(str, expected))
            raise IntegrityError(f"{name} is {got}, config.json says {want}", str(directory), "use the config.json of these weights")
    return shapes
