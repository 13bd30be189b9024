"""What a method may look at to start its mixers: the teacher's own q, k, v and attention output on a few sequences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from linearize.modeling.mixer import Inputs
from linearize.modeling.spec import MixerSpec
from linearize.modeling.window import visible

ROW_BLOCK = 256


@dataclass(frozen=True)
class Calibration:
    """One layer's inputs (full rows, no padding) and the original attention's output (B, T, H, V)."""

    inputs: Inputs
    target: Tensor
    _masses: dict[MixerSpec, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def rows(self) -> Iterator[tuple[slice, Tensor]]:
        """The teacher's scores (B, H, block, T) a block of queries at a time, -inf at later keys."""
        q, k = self.inputs.q.float(), self.inputs.k.float()
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        time = q.shape[2]
        keys = torch.arange(time, device=q.device)
        for start in range(0, time, ROW_BLOCK):
            block = slice(start, min(start + ROW_BLOCK, time))
            scores = self.inputs.score(q[:, :, block], k)
            yield block, scores.masked_fill(keys > keys[block, None], -torch.inf)

    def far_log_mass(self, spec: MixerSpec) -> tuple[Tensor, Tensor]:
        """log sum exp of the teacher's scores over far keys, and over all keys: (B, H, T) each; computed once."""
        if spec not in self._masses:
            self._masses[spec] = self._far_log_mass(spec)
        return self._masses[spec]

    def _far_log_mass(self, spec: MixerSpec) -> tuple[Tensor, Tensor]:
        far, every = [], []
        time = self.inputs.q.shape[2]
        keys = torch.arange(time, device=self.inputs.q.device)
        for block, scores in self.rows():
            near = visible(spec, keys[block, None], keys) | (keys < spec.sinks)
            every.append(scores.logsumexp(-1))
            far.append(scores.masked_fill(near, -torch.inf).logsumexp(-1))
        return torch.cat(far, dim=-1), torch.cat(every, dim=-1)

    def mean_distance(self) -> Tensor:
        """Mean attention distance of each head (H,): sum_i A_ti (t - i), averaged over t."""
        time = self.inputs.q.shape[2]
        keys = torch.arange(time, device=self.inputs.q.device, dtype=torch.float32)
        total = sum((scores.softmax(-1) * (keys[block, None] - keys)).sum((0, 2, 3)) for block, scores in self.rows())
        assert isinstance(total, Tensor)
        return total / (time * self.inputs.q.shape[0])


def relative_error(output: Tensor, target: Tensor, start: int = 0) -> Tensor:
    """sum ||y - y'||^2 / sum ||y||^2 over positions from `start`, a head: (H,)."""
    output, target = output[:, start:].float(), target[:, start:].float()
    return (output - target).square().sum((0, 1, 3)) / target.square().sum((0, 1, 3)).clamp(min=1e-12)
