"""Where one new token of each row stands: computed once a call, and shared by all layers with the same window."""

from __future__ import annotations

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .spec import MixerSpec
from .window import ring_positions, visible


class Place:
    """For a token after `count` (B,) others, over the exact places, [ring | slots | sinks]:

    position (B, 1); `fresh` (B, 1, L, 1) the places of the buffers that the token itself takes; `hidden` (B, 1, 1, L) those
    that its query does not see, slots apart, and `unseen` the same of ring and sinks alone; `distance` (B, 1, 1, R) back to the
    keys of the ring. Of the tokens that leave the window at this moment: their `leaving` places in the ring and `old` positions
    (B, block), and which of them are `valid`.
    """

    def __init__(self, spec: MixerSpec, count: Tensor) -> None:
        self.count, self.after, self.position = count, count + 1, count[:, None]
        if not spec.has_near:
            return
        ring, sinks = (torch.arange(size, device=count.device) for size in (spec.recent, spec.sinks))
        slots = torch.zeros(len(count), spec.slots, dtype=torch.bool, device=count.device)
        offsets = torch.arange(spec.block, device=count.device)
        self.leaving = (self.position + offsets) % spec.recent
        self.old = self.position - spec.recent + offsets
        self.valid = self.old >= spec.sinks
        if spec.block > 1:
            self.valid = self.valid & (self.position % spec.block == 0)
        self.fresh = torch.cat([self.leaving[:, :1] == ring, self.position == sinks], dim=1)[:, None, :, None]
        key = ring_positions(self.after, spec.recent)
        behind, later = ~visible(spec, self.position, key), self.position < sinks
        self.unseen = torch.cat([behind, later], dim=1)[:, None, None]
        self.hidden = torch.cat([behind, slots, later], dim=1)[:, None, None] if spec.slots else self.unseen
        self.distance = (self.position - key)[:, None, None]

    def put(self, buffer: Tensor, new: Tensor) -> Tensor:
        """A buffer (B, h, L or fewer, D) with the new token (B, h, 1, D), as it is stored, in its places."""
        return torch.where(self.fresh[:, :, : buffer.shape[2]], new.to(buffer.dtype), buffer)

    def take(self, buffer: Tensor) -> Tensor:
        """What the tokens that leave hold in a buffer (B, h, L, D), before the new one is put: (B, h, block, D)."""
        index = self.leaving[:, None, :, None].expand(-1, buffer.shape[1], -1, buffer.shape[3])
        return buffer.gather(2, index)


class Places:
    """The places of one call, by window. A layer whose count is another tensor gets its own."""

    def __init__(self) -> None:
        self.found: dict[tuple[object, ...], Place] = {}

    def of(self, spec: MixerSpec, count: Tensor) -> Place:
        window = (spec.has_near, spec.window, spec.window_kind, spec.sinks, spec.slots)
        place = self.found.get(window)
        if place is None or place.count is not count:
            place = self.found[window] = Place(spec, count)
        return place
