"""Steps that must not count: a loss or gradient that is not finite, its rows kept to look at, and the layer it came from."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from linearize.errors import TrainingError

IN_A_ROW = 3
SKIPPED = "skipped"  # a folder of the run's
KEPT_ROWS = 5  # files of skipped rows; a run that fails at every step must not fill the disk


@dataclass
class Guard:
    """Counts skipped steps of a stage and keeps the rows of the first few in `folder`."""

    folder: Path
    stage: str
    skipped: int = 0
    in_a_row: int = 0

    def saw(self, loss: float) -> bool:
        """Note a step's loss; True when so many in a row were not finite that the last good state must come back."""
        finite = math.isfinite(loss)
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.skipped += not finite
        return self.in_a_row >= IN_A_ROW

    def keep(self, step: int, rank: int, ids: Tensor, positions: Tensor) -> None:
        """Write the rows (B, T) of a step that is skipped."""
        if self.skipped >= KEPT_ROWS:
            return
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"{self.stage}-{step:08d}-{rank}.safetensors"
        save_file({"ids": ids.cpu().contiguous(), "positions": positions.cpu().contiguous()}, path)


def worst_layer(parameters: Mapping[str, nn.Parameter]) -> str:
    """The parameter whose gradient is not finite, first by layer, or else the one with the largest; its layer is named."""
    norms = {name: float(p.grad.norm()) for name, p in parameters.items() if p.grad is not None}
    if not norms:
        return "no parameter has a gradient"
    bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
    name = bad[0] if bad else max(norms, key=lambda own: norms[own])
    layer = re.search(r"\.(\d+)\.", name)
    return f"layer {layer[1]} ({name})" if layer else name


def check_finite(tensors: Iterable[tuple[str, Tensor]], where: str, kept: str) -> None:
    """TrainingError before anything that is not finite would be saved; `kept` says what is there instead."""
    for name, x in tensors:
        if not bool(torch.isfinite(x).all()):
            raise TrainingError(f"{name} is not finite, nothing was saved", where, kept)


@contextmanager
def drawn(device: torch.device, *numbers: int) -> Iterator[None]:
    """What is drawn inside (dropout) depends on these numbers alone, so that a resumed run draws what the first would have."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number) % 2**63
    alone = device.type == "cpu"  # of no other device, for each of which torch.manual_seed writes down where it was called
    with torch.random.fork_rng(devices=[], enabled=alone):
        torch.default_generator.manual_seed(seed) if alone else torch.manual_seed(seed)
        yield
