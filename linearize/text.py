"""Text in, rows of tokens out: built-in, local and hub documents, split by hash, packed with their boundaries kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

BUILTIN = "builtin"
SUFFIXES = {".txt", ".md", ".rst", ".py", ".jsonl"}
HELD_OUT_PERCENT = 10


def documents(source: str) -> list[str]:
    """Documents of 'builtin' (the Python manual's topics, with every Python), a file, folder or glob, or a hub data set.

    InputError names what cannot be read, before any work starts.
    """
    if source == BUILTIN:
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics)]
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    else:
        files = [path] if path.is_file() else sorted(Path(p) for p in glob(str(path), recursive=True) if Path(p).is_file())
    if not files and (path.suffix or path.exists() or source.count("/") != 1):
        raise InputError("no text found", source, "pass a .txt or .jsonl file, a folder, a glob, a hub data set or 'builtin'")
    found = [doc for file in files for doc in _read(file)] if files else _hub(source)
    found = [doc for doc in found if doc.strip()]
    if not found:
        raise InputError("the text is empty", source, "pass a file with some text in it")
    return found


def _read(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 (byte {error.start})", str(path), "convert it: iconv -t UTF-8") from None
    except OSError as error:
        raise InputError(f"cannot read ({error.strerror})", str(path), "check the path and its permissions") from None
    return _json_lines(text, path) if path.suffix == ".jsonl" else [text]


def _json_lines(text: str, path: Path) -> list[str]:
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            raise InputError("not JSON", f"{path}:{number}", "one JSON object a line, with a 'text' field") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            columns = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise InputError(f"has {columns}; expected text", f"{path}:{number}", "name the field with the document 'text'")
        found.append(row["text"])
    return found


def _hub(source: str) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError("no such file, and hub data sets need datasets", source, "pip install 'linearize[data]'") from None
    try:
        rows = load_dataset(source, split="train")
    except Exception as error:  # whatever the hub, the network or the data set raises
        raise InputError(f"cannot load the data set ({type(error).__name__})", source, "pass a local file or folder") from None
    if "text" not in rows.column_names:
        raise InputError(f"has columns {', '.join(rows.column_names)}; expected text", source, "pass a set with a 'text' column")
    return list(rows["text"])


def fingerprint(document: str) -> int:
    """A number that depends on the document alone: which side of a split it falls on never changes."""
    return int.from_bytes(hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def split(docs: Sequence[str], percent: int = HELD_OUT_PERCENT) -> tuple[list[str], list[str]]:
    """Training and held-out documents, by hash: at least one on each side of two or more, a single one for training."""
    order = sorted(docs, key=fingerprint)
    held = {id(d) for d in order if fingerprint(d) % 100 < percent}
    if len(order) > 1 and not held:
        held = {id(order[0])}
    if len(held) == len(order):
        held -= {id(order[-1])} if order else set()
    return [d for d in docs if id(d) not in held], [d for d in docs if id(d) in held]


@dataclass(frozen=True)
class Packed:
    """Token ids (N, T) and positions (N, T) that start again at each document; targets across a boundary do not count.

    `mask_token` stands for hidden tokens, where an encoder is to guess them.
    """

    ids: Tensor
    positions: Tensor
    mask_token: int | None = None

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def tokens(self) -> int:
        return self.ids.numel()


def tokenise(tokenizer: Any, docs: Iterable[str], limit: int | None = None) -> list[list[int]]:
    """Token ids of each document, ended by the tokenizer's end; stops after `limit` tokens."""
    found, total = [], 0
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    for doc in docs:
        ids = tokenizer(doc, add_special_tokens=False, verbose=False)["input_ids"] + end
        found.append(ids)
        total += len(ids)
        if limit is not None and total >= limit:
            break
    return found


def pack(documents: Sequence[Sequence[int]], length: int) -> Packed:
    """Rows of exactly `length` tokens; a document goes on in the next row, from position 0. An unfilled last row is left out."""
    import torch

    ids: list[int] = []
    positions: list[int] = []
    for doc in documents:
        start = 0
        while start < len(doc):
            take = min(length - len(ids) % length, len(doc) - start)
            ids.extend(doc[start : start + take])
            positions.extend(range(take))
            start += take
    rows = len(ids) // length
    if not rows:
        raise InputError(
            f"the text has {len(ids)} tokens, fewer than one row of {length}", "--sequence", "more text, or a shorter --sequence"
        )

    def shape(values: list[int]) -> Tensor:
        return torch.tensor(values[: rows * length], dtype=torch.long).view(rows, length)

    return Packed(shape(ids), shape(positions))


def whole(documents: Sequence[Sequence[int]], length: int) -> Packed:
    """Rows that each lie inside one document: for figures at long positions, where a boundary would start the text again."""
    inside = [doc[i : i + length] for doc in documents for i in range(0, len(doc) - length + 1, length)]
    return pack(inside or documents, length)


def framed(tokenizer: Any, documents: Sequence[Sequence[int]], length: int) -> Packed:
    """Rows as an encoder reads them: each a piece of one document between the tokenizer's first and last special tokens."""
    first, last = ([x] if x is not None else [] for x in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    room = max(length - len(first) - len(last), 1)
    pieces = [[*first, *doc[i : i + room], *last] for doc in documents for i in range(0, len(doc), room)]
    return replace(whole(pieces, length), mask_token=tokenizer.mask_token_id)
