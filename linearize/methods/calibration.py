"""What a method may look at to start its mixers: the teacher's own q, k, v and attention output on a few sequences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from linearize.methods.base import ROW_BLOCK
from linearize.modeling.stream import Inputs

ROWS = ("q", "k", "v", "hidden", "mask", "segments", "cos", "sin", "raw_q", "raw_k")  # inputs with a first dimension of rows


@dataclass(frozen=True)
class Calibration:
    """One layer's inputs (full rows, no padding) and the original attention's output (B, T, H, V)."""

    inputs: Inputs
    target: Tensor
    _kept: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _parts: dict[tuple[int, int, int] | int, Calibration] = field(default_factory=dict, repr=False)

    def part(self, rows: slice) -> Calibration:
        """Some of the rows alone; the same ones are one object, so that what was computed of them is kept."""
        wanted = rows.indices(len(self.target))
        if wanted not in self._parts:
            every = {name: getattr(self.inputs, name) for name in ROWS}
            shared = {name: x for name, x in every.items() if x is not None and len(x) < len(self.target)}  # one for all rows
            cut = {name: x[rows] for name, x in every.items() if x is not None} | shared
            self._parts[wanted] = Calibration(replace(self.inputs, **cut), self.target[rows])
        return self._parts[wanted]

    def first(self, tokens: int) -> Calibration:
        """The first tokens of each row alone; of the same number one object."""
        tokens = min(tokens, self.target.shape[1])
        if tokens not in self._parts:
            self._parts[tokens] = Calibration(self.inputs.first(tokens), self.target[:, :tokens])
        return self._parts[tokens]

    def rows(self) -> Iterator[tuple[slice, Tensor]]:
        """The teacher's scores (B, H, block, stop) of a block of queries over keys up to its end, -inf at those it does not see."""
        wide = torch.promote_types(self.inputs.q.dtype, torch.float32)
        q, k = self.inputs.q.to(wide), self.inputs.k.to(wide)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        time = q.shape[2]
        keys = torch.arange(time, device=q.device)
        for start in range(0, time, ROW_BLOCK):
            block = slice(start, min(start + ROW_BLOCK, time))
            scores, seen = self.inputs.score(q[:, :, block], k[:, :, : block.stop]), keys[: block.stop]
            scores[..., block].masked_fill_(keys[block] > keys[block, None], -torch.inf)
            if self.inputs.score.sliding is not None:
                scores.masked_fill_(seen <= keys[block, None] - self.inputs.score.sliding, -torch.inf)
            yield block, scores

    def log_mass(self) -> Tensor:
        """log sum exp of the teacher's scores over all keys and learned sinks of each query: (B, H, T); computed once."""
        if "log_mass" not in self._kept:
            every, null = torch.cat([scores.logsumexp(-1) for _, scores in self.rows()], dim=-1), self.inputs.score.null
            self._kept["log_mass"] = every if null is None else torch.logaddexp(every, null.to(every.dtype)[:, None])
        return self._kept["log_mass"]

    def mean_distance(self) -> Tensor:
        """Mean attention distance of each head (H,): sum_i A_ti (t - i), averaged over t; computed once."""
        if "mean_distance" not in self._kept:
            time = self.inputs.q.shape[2]
            keys = torch.arange(time, device=self.inputs.q.device, dtype=torch.float32)
            total = sum(
                (scores.softmax(-1) * (keys[block, None] - keys[: block.stop])).sum((0, 2, 3)) for block, scores in self.rows()
            )
            assert isinstance(total, Tensor)
            self._kept["mean_distance"] = total / (time * self.inputs.q.shape[0])
        return self._kept["mean_distance"]


def relative_error(output: Tensor, target: Tensor, start: int = 0) -> Tensor:
    """sum ||y - y'||^2 / sum ||y||^2 over positions from `start`, a head: (H,)."""
    output, target = output[:, start:].float(), target[:, start:].float()
    return (output - target).square().sum((0, 1, 3)) / target.square().sum((0, 1, 3)).clamp(min=1e-12)
