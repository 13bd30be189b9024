"""Where one new token of each row stands: computed once a call, and shared by all layers with the same window."""

from __future__ import annotations

from functools import cached_property

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .spec import MixerSpec
from .window import ring_positions, visible


class Place:
    """What is asked of it, for a token after `count` (B,) others, over the exact places, [ring | slots | sinks]:

    position (B, 1); `fresh` (B, 1, L, 1) the places of the buffers that the token itself takes; `hidden` (B, 1, 1, L) those
    that its query does not see, slots apart, and `unseen` the same of ring and sinks alone; `distance` (B, 1, 1, R) back to the
    keys of the ring. Of the tokens that leave the window at this moment: their `leaving` places in the ring and `old` positions
    (B, block), and which of them are `valid`.
    """

    def __init__(self, spec: MixerSpec, count: Tensor) -> None:
        self.spec, self.count, self.after = spec, count, count + 1

    @cached_property
    def position(self) -> Tensor:
        return self.count[:, None]

    @cached_property
    def _offsets(self) -> Tensor:
        return torch.arange(self.spec.block, device=self.count.device)

    @cached_property
    def leaving(self) -> Tensor:
        return (self.position + self._offsets) % self.spec.recent

    @cached_property
    def old(self) -> Tensor:
        return self.position - self.spec.recent + self._offsets

    @cached_property
    def valid(self) -> Tensor:
        found: Tensor = self.old >= self.spec.sinks
        return found & (self.position % self.spec.block == 0) if self.spec.block > 1 else found

    @cached_property
    def fresh(self) -> Tensor:
        ring, sinks = (torch.arange(size, device=self.count.device) for size in (self.spec.recent, self.spec.sinks))
        return torch.cat([self.leaving[:, :1] == ring, self.position == sinks], dim=1)[:, None, :, None]

    @cached_property
    def _keys(self) -> Tensor:
        return ring_positions(self.after, self.spec.recent)

    @cached_property
    def _unseen(self) -> tuple[Tensor, Tensor]:
        later = self.position < torch.arange(self.spec.sinks, device=self.count.device)
        return ~visible(self.spec, self.position, self._keys), later

    @cached_property
    def unseen(self) -> Tensor:
        return torch.cat(self._unseen, dim=1)[:, None, None]

    @cached_property
    def hidden(self) -> Tensor:
        behind, later = self._unseen
        slots = torch.zeros(len(self.count), self.spec.slots, dtype=torch.bool, device=self.count.device)
        return torch.cat([behind, slots, later], dim=1)[:, None, None] if self.spec.slots else self.unseen

    @cached_property
    def distance(self) -> Tensor:
        return (self.position - self._keys)[:, None, None]

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
