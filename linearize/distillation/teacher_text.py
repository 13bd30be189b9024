"""`--data teacher`: the files that hold what was sampled, so that a run that goes on, and every process, learns from the same."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from linearize.checkpoint import read_manifest
from linearize.distillation.sampling import Sampler
from linearize.distillation.sharding import is_sharded
from linearize.documents import TEACHER, is_teacher
from linearize.errors import UsageError
from linearize.methods.base import Stage
from linearize.modeling.plans import plan_layers
from linearize.modeling.spec import Shape
from linearize.progress import Progress
from linearize.recipe import count as read_count
from linearize.text import HELD_OUT_PERCENT

if TYPE_CHECKING:
    from accelerate import Accelerator

CAP = 1_000_000  # tokens that are sampled unless more are asked for: a larger budget reads them again
CACHE_BYTES = 1e9  # of keys and values
ROWS = 32  # documents at once, at most
FACTS = "facts.json"


def wanted_tokens(sources: Sequence[str], stages: Sequence[Stage]) -> int:
    """How many tokens are to be sampled: what `teacher:N` says, else the largest stage's budget and what is held out of it.

    0 where no source is the teacher. UsageError for what cannot be read.
    """
    asked = [source.partition(":")[2] for source in sources if is_teacher(source)]
    if not asked:
        return 0
    try:
        said = [read_count(number) for number in asked if number]
    except (ValueError, OverflowError):
        raise UsageError(f"'{asked[0]}' is not a number of tokens", "--data", f"{TEACHER}, or as in {TEACHER}:500k") from None
    budget = max(stage.tokens for stage in stages) * 100 / (100 - HELD_OUT_PERCENT)
    return max(said, default=min(int(budget), CAP))


def batch_rows(plan: dict[str, Any], length: int, tokens: int, itemsize: int) -> int:
    """Documents that are sampled at once: what the keys and values leave room for, and not many more than are wanted."""
    shapes = [Shape(**layer["shape"]) for layer in plan_layers(plan)]
    each = sum(shape.kv_heads * (shape.head_dim + shape.value_dim) for shape in shapes)
    each = each * (len(shapes) + plan["softmax_layers"]) // len(shapes) * itemsize
    return max(min(int(CACHE_BYTES / (each * length)), ROWS, -(-tokens // length)), 1)


@dataclass
class TeacherText:
    """Documents in numbered files of `folder`, `rows` in each; a file is whole or not there."""

    accelerator: Accelerator
    sampler: Sampler
    folder: Path
    rows: int
    progress: Progress

    def documents(self, tokens: int) -> list[str]:
        """At least so many tokens of documents, sampled where they are not there yet: each process its share of the files.

        The text does not depend on how many processes there are.
        """
        began, first = time.monotonic(), self._have(tokens)[1]
        while True:
            texts, found = self._have(tokens)
            missing = list(islice(self._missing(), self.accelerator.num_processes))
            self.accelerator.wait_for_everyone()  # all have looked
            if found >= tokens:
                return texts
            self._write(missing[self.accelerator.process_index], found, first, tokens, began)
            self.accelerator.wait_for_everyone()  # all have written

    def _have(self, tokens: int) -> tuple[list[str], int]:
        """Documents of the files from the first on, until there are so many tokens or one is missing; and their tokens."""
        texts: list[str] = []
        total = 0
        for number in count():
            if total >= tokens or not self._path(number).exists():
                return texts, total
            for line in self._path(number).read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                texts.append(row["text"])
                total += row["tokens"]
        raise AssertionError

    def _missing(self) -> Iterator[int]:
        return (number for number in count() if not self._path(number).exists())

    def _path(self, number: int) -> Path:
        return self.folder / f"sampled-{number:06d}.jsonl"

    def _write(self, number: int, before: int, first: int, wanted: int, began: float) -> None:
        """Sample a file's documents: those of one kind of opening, so that all begin alike."""
        kinds, processes = len(self.sampler.openings), self.accelerator.num_processes
        block, kind = divmod(number, kinds)
        indices = [kind + kinds * (block * self.rows + row) for row in range(self.rows)]
        done = before

        def told(tokens: int) -> None:
            nonlocal done
            done = min(done + tokens * processes, wanted)
            speed = (done - first) / max(time.monotonic() - began, 1e-9)
            self.progress("sample", done, wanted, tokens=done, tokens_per_second=round(speed))

        found = [(one.text(self.sampler.tokenizer), one.size) for one in self.sampler.sample(indices, told)]
        lines = [json.dumps({"text": x, "tokens": size}, ensure_ascii=False) + "\n" for x, size in found if x.strip()]
        path = self._path(number)
        aside = path.with_suffix(f".tmp-{os.getpid()}")
        aside.write_text("".join(lines), encoding="utf-8")
        aside.replace(path)


def teacher_documents(
    accelerator: Accelerator, model: Any, tokenizer: Any, directory: Path, folder: Path, *,
    tokens: int, length: int, seed: int, progress: Progress,
) -> list[str]:  # fmt: skip
    """At least `tokens` tokens of documents, of at most `length` each, of the teacher in `model`, which `directory` holds.

    They are in `folder`; what another teacher, length or seed left there is removed.
    """
    rows = batch_rows(model.config.linearize, length, tokens, model.dtype.itemsize)
    hashes = {name: entry["sha256"] for name, entry in read_manifest(directory)["files"].items() if name.endswith(".safetensors")}
    facts = {"length": length, "seed": seed, "rows": rows, "dtype": str(model.dtype), "weights": hashes}
    if accelerator.is_main_process and facts != _facts(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")
    accelerator.wait_for_everyone()

    def any_goes_on(mine: bool) -> bool:
        return bool(accelerator.reduce(torch.tensor([float(mine)], device=accelerator.device), "sum") > 0)

    goes_on = any_goes_on if is_sharded(model) else bool  # layers that are gathered run in all processes or in none
    sampler = Sampler(model, tokenizer, length, seed, goes_on)
    return TeacherText(accelerator, sampler, folder, rows, progress).documents(tokens)


def _facts(folder: Path) -> Any:
    try:
        return json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
