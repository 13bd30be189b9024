"""Weight files checked by their headers, before anything is loaded."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linearize.conversion.architectures import ARCHITECTURES
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
            legible = text.isascii() and text.isprintable()
            what = f'is not safetensors (starts with "{text}")' if legible else "header is invalid"
            raise IntegrityError(f"{path.name} {what}", str(path), AGAIN)
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise IntegrityError(f"{path.name} header is not JSON", str(path), AGAIN) from None
    try:
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        offsets = sorted((*map(int, entry["data_offsets"]), name, len(entry["shape"])) for name, entry in tensors.items())
        spans = [(first, last, name) for first, last, name, _ in offsets]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise IntegrityError(f"{path.name} header is invalid: not every tensor has a shape and offsets", str(path), AGAIN) from None
    end = 0
    for first, last, name in spans:
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
            raise IntegrityError(
                f"index names {len(names)} files, {present} present: missing {missing[0]}", str(directory), "download it again"
            )
        return [directory / name for name in names]
    if single.exists():
        return [single]
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
        raise IntegrityError(
            "only pickle weights found; refusing to execute them", str(directory), "save the model as safetensors first"
        )
    raise IntegrityError("no weights found (model.safetensors)", str(directory), "pass the folder that holds the weights")


def check_weights(directory: Path, config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Every weight file's header, and the shapes that the config tells. Returns tensor shapes."""
    shapes = {name: entry["shape"] for path in weight_files(directory) for name, entry in safetensors_header(path).items()}
    for name, expected in expected_shapes(shapes, config).items():
        if shapes.get(name) != expected:
            got = "×".join(map(str, shapes[name])) if name in shapes else "missing"
            what = f"{name} is {got}, config.json says {'×'.join(map(str, expected))}"
            raise IntegrityError(what, str(directory), "use the config.json of these weights")
    return shapes


def expected_shapes(shapes: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Shapes of the embedding and, in families that name them apart, of every layer's projections to queries, keys and values."""
    found = {}
    if config.get("vocab_size") and config.get("hidden_size"):
        names = [name for name in shapes if name.endswith("embed_tokens.weight")]
        found = {name: [config["vocab_size"], config["hidden_size"]] for name in names}
    family = ARCHITECTURES.get(str(config.get("model_type")))
    if family is None or len(set(family.projections.values())) < len(family.projections):
        return found
    shape = family.shape(config)
    rows = {"q": shape.heads * shape.head_dim, "k": shape.kv_heads * shape.head_dim, "v": shape.kv_heads * shape.value_dim}
    for part, count in rows.items():
        name = f"{family.attention}.{family.projections.get(part)}.weight"
        if name.format(0) in shapes:
            found |= {name.format(i): [count, shape.hidden_size] for i in range(family.layers(config))}
    return found
