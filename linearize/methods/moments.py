"""Moment matching of log-normal features (LLN, Nahshan et al. 2024). Imported only when a model is converted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from linearize.modeling.feature_maps_fixed import LogNormal

if TYPE_CHECKING:
    from torch import Tensor

    from linearize.methods.calibration import Calibration
    from linearize.modeling.mixer import Mixer

SAMPLES = 64  # tokens of a row, at equal distances; every pair of them where the query sees the key counts
LARGEST = 8.0
STEPS = 30


def match_moments(mixer: Mixer, calibration: Calibration) -> None:
    """Scales t / std(q) and t / std(k) at which log sum_d e^(t q_d / std(q) + t k_d / std(k)) varies as the teacher's scores do.

    One t a memory, by bisection: heads that share keys share their scale, and match on average.
    """
    map_q, map_k = mixer.map_q, mixer.map_k
    if not isinstance(map_q, LogNormal) or not isinstance(map_k, LogNormal):
        return
    import torch

    stream, inputs = mixer.halves(calibration.inputs).stream, calibration.inputs
    time = inputs.q.shape[2]
    sample = torch.linspace(0, time - 1, min(time, SAMPLES), device=inputs.q.device).long()
    real = (sample[:, None] >= sample) | (not mixer.spec.causal)
    q, k = stream.far_q.float(), stream.far_k.float().repeat_interleave(mixer.repeats, dim=1)
    q_size, k_size = (x.transpose(0, 1).flatten(1).std(1).clamp(min=1e-6) for x in (q, k))
    wide = inputs.k.float().repeat_interleave(mixer.groups, dim=1)
    scores = inputs.score(inputs.q[:, :, sample].float(), wide[:, :, sample])
    wanted = _by_memory(_variance(scores, real), mixer.memories)
    q = q[:, :, sample] / q_size[:, None, None]
    k = (k[:, :, sample] / k_size[:, None, None]).repeat_interleave(mixer.readers, dim=1)
    low, high = torch.zeros_like(wanted), torch.full_like(wanted, LARGEST)
    for _ in range(STEPS):
        t = (low + high) / 2
        scale = t.repeat_interleave(mixer.readers)[:, None, None]
        logs = torch.stack([(scale * (row[:, :, None] + k)).logsumexp(-1) for row in q.unbind(2)], dim=2)
        more = _by_memory(_variance(logs, real), mixer.memories) < wanted
        low, high = torch.where(more, t, low), torch.where(more, high, t)
    map_q.scale.copy_(low.repeat_interleave(mixer.readers) / q_size)
    map_k.scale.copy_(low / k_size)


def _variance(logs: Tensor, real: Tensor) -> Tensor:
    """Of (B, H, n, n) over rows and the pairs that count: (H,)."""
    return logs[:, :, real].transpose(0, 1).flatten(1).var(1)


def _by_memory(x: Tensor, memories: int) -> Tensor:
    return x.view(memories, -1).mean(1)
