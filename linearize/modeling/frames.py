"""Frames: a call's tokens laid out so that whole blocks of the row's absolute positions are whole blocks of the tensor."""

from __future__ import annotations

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .spec import MixerSpec


class Frame:
    """T new tokens after `count` (B,) earlier ones, until `after` (B,), in places of a frame that begins on a multiple of `align`.

    Query i stands at place `offset + i`. The token that leaves the window at place p has position `position[:, p]` and index
    `source[:, p]` in the buffer of recent and new tokens, so that place p of a sliding window meets its own query.
    """

    def __init__(self, spec: MixerSpec, count: Tensor, after: Tensor, time: int, align: int) -> None:
        self.time, self.offset, self.capacity = time, count % align, time + spec.recent
        self.shifted = align > 1 and bool(self.offset.any())
        length = time + (align if self.shifted else 0)
        self.place = torch.arange(length + -length % align, device=count.device)
        self.source = self.place - self.offset[:, None]
        self.query = count[:, None] + self.source  # the position of the query at each place
        self.position = self.query - spec.recent
        enters = self.place if spec.block == 1 else self.place - self.place % spec.block  # its block enters whole
        begun = (count - self.offset)[:, None] + enters
        self.valid = (self.position >= spec.sinks) & (begun < after[:, None]) & (enters >= self.offset[:, None])

    def __len__(self) -> int:
        return len(self.place)

    def leaving(self, joined: Tensor) -> Tensor:
        """Of the recent and new tokens (B, h, R + T, .), those that leave at each place: (B, h, P, .)."""
        if not self.shifted:
            return joined[:, :, : len(self)]
        index = self.source.clamp(min=0, max=self.capacity - 1)
        return joined.gather(2, index[:, None, :, None].expand(-1, joined.shape[1], -1, joined.shape[3]))

    def queries(self, q: Tensor) -> Tensor:
        """Queries (B, M, R, T, K) at their places (B, M, R, P, K); the rest is zero or repeated and read by nobody."""
        if not self.shifted:
            missing = len(self) - self.time
            return torch.nn.functional.pad(q, (0, 0, 0, missing)) if missing else q
        index = self.source.clamp(min=0, max=self.time - 1)[:, None, None, :, None]
        return q.gather(3, index.expand(-1, *q.shape[1:3], -1, q.shape[-1]))

    def back(self, read: Tensor) -> Tensor:
        """(B, M, R, P, V) to the queries (B, M, R, T, V)."""
        if not self.shifted:
            return read[..., : self.time, :]
        index = (torch.arange(self.time, device=read.device) + self.offset[:, None])[:, None, None, :, None]
        return read.gather(3, index.expand(-1, *read.shape[1:3], -1, read.shape[-1]))
