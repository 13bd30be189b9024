"""What one layer reads, kept on disk: the hidden states of every distinct row, in a flat file of fixed size that is not mapped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize.checkpoint import check_space
from linearize.errors import IntegrityError, ResourceError

FULL = (28, 122)  # errno: no space, quota


def row_keys(ids: Tensor, positions: Tensor) -> list[bytes]:
    """What tells rows (B, T) apart: the same tokens at the same positions have the same hidden states."""
    both = torch.stack([ids, positions], 1).cpu().contiguous()
    return [hashlib.blake2b(row.numpy().tobytes(), digest_size=16).digest() for row in both]


class LayerInputs:
    """Hidden states (T, D) by row, in `path`, and beside it in JSON what they are.

    The file is made by the first write, whole, so that a disk that is too small says so at once. Which rows are there is
    written by `sync` alone, after the rows: a file that outlived its process holds what its last `sync` saw, and maybe more.
    """

    def __init__(self, path: Path, slots: dict[bytes, int]) -> None:
        self.path, self.slots, self.said = path, slots, path.with_suffix(".json")
        self.there = bytearray(len(slots))
        self.facts: dict[str, Any] = {}
        self.dtype, self.row = torch.float32, 0
        self.file: int | None = None
        if self.said.exists():
            self._open(json.loads(self.said.read_text(encoding="utf-8")))

    def read(self, keys: Sequence[bytes]) -> Tensor:
        """Hidden states (B, T, D). IntegrityError for a row that is not there."""
        rows = []
        for key in keys:
            slot = self.slots[key]
            if self.file is None or not self.there[slot]:
                raise IntegrityError(f"row {slot} of the layer inputs is missing", str(self.path), "begin anew with --overwrite")
            data = bytearray(os.pread(self.file, self.row, slot * self.row))
            if len(data) != self.row:
                raise IntegrityError("the layer inputs are truncated", str(self.path), "begin anew with --overwrite")
            rows.append(torch.frombuffer(data, dtype=self.dtype).view(self.facts["shape"]))
        return torch.stack(rows)

    def write(self, keys: Sequence[bytes], hidden: Tensor, in_tuple: bool = False) -> None:
        """Keep those of hidden (B, T, D) that are not there yet. `in_tuple`: the layer returned them in a tuple."""
        if self.file is None:
            facts = {"dtype": str(hidden.dtype).removeprefix("torch."), "shape": list(hidden.shape[1:]), "rows": len(self.slots)}
            self._create({**facts, "in_tuple": in_tuple})
        assert self.file is not None
        for key, row in zip(keys, hidden.cpu(), strict=True):
            slot = self.slots[key]
            if not self.there[slot]:
                data = row.contiguous().view(torch.uint8).numpy().data
                if os.pwrite(self.file, data, slot * self.row) != self.row:
                    raise ResourceError(
                        "the layer inputs could not be written", str(self.path), "free some space, then --resume auto"
                    )
                self.there[slot] = 1

    def sync(self) -> None:
        """Make the rows durable, and only then say that they are there."""
        if self.file is not None:
            os.fsync(self.file)
            os.pwrite(self.file, bytes(self.there), len(self.slots) * self.row)
            os.fsync(self.file)

    def missing(self) -> int:
        return self.there.count(0)

    def close(self) -> None:
        if self.file is not None:
            os.close(self.file)
        self.file = None

    def remove(self) -> None:
        self.close()
        self.said.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def _create(self, facts: dict[str, Any]) -> None:
        self._measure(facts)
        total = len(self.slots) * (self.row + 1)
        check_space(self.path, total)
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self.file, 0, total)
            else:
                os.truncate(self.file, total)
        except OSError as error:
            if error.errno in FULL:
                raise ResourceError(
                    f"no room for {total / 1e9:.1f} GB of layer inputs", str(self.path), "free some space"
                ) from error
            raise
        self.said.write_text(json.dumps(facts), encoding="utf-8")

    def _open(self, facts: dict[str, Any]) -> None:
        self._measure(facts)
        total, size = len(self.slots) * (self.row + 1), self.path.stat().st_size if self.path.exists() else 0
        if facts["rows"] != len(self.slots) or size != total:
            raise IntegrityError(f"layer inputs of {size} bytes, not {total}", str(self.path), "begin anew with --overwrite")
        self.file = os.open(self.path, os.O_RDWR)
        self.there = bytearray(os.pread(self.file, len(self.slots), len(self.slots) * self.row))

    def _measure(self, facts: dict[str, Any]) -> None:
        self.facts, self.dtype = facts, getattr(torch, facts["dtype"])
        time, width = facts["shape"]
        self.row = time * width * self.dtype.itemsize
