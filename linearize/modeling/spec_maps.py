"""What a mixer's rules must know of each feature map: standard library only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def same(size: int) -> int:
    return size


def double(size: int) -> int:
    return 2 * size


def products(size: int) -> int:
    """x_i x_j for i <= j."""
    return size * (size + 1) // 2


@dataclass(frozen=True)
class MapTraits:
    """`width`: features of so many columns; `sized`: the columns are a learned or drawn projection's, feature_dim says how many.

    `positive`: products phi(q) . phi(k) are >= 0, so that they can be a denominator; `signed`: though the features are not.
    `unit`: features have length one up to an epsilon of the map's own, so that rule 'delta' takes them as its keys.
    """

    width: Callable[[int], int] = same
    sized: bool = False
    positive: bool = True
    signed: bool = False
    unit: bool = False

    @property
    def by_channel(self) -> bool:
        """Feature c comes of channel c, so that a gate of the key's channels fits the features."""
        return not self.sized and self.width is same


MAPS: dict[str, MapTraits] = {
    "identity": MapTraits(positive=False),
    "l2norm": MapTraits(positive=False),
    "unit": MapTraits(positive=False, unit=True),
    "softmax": MapTraits(),
    "elu1": MapTraits(),
    "relu": MapTraits(),
    "focused": MapTraits(),
    "lln": MapTraits(),
    "t2r": MapTraits(sized=True),
    "feedforward": MapTraits(sized=True),
    "cosformer": MapTraits(double),
    "nala": MapTraits(double),
    "performer": MapTraits(double, sized=True),
    "hedgehog": MapTraits(double, sized=True),
    "hedgehog_exp": MapTraits(double, sized=True),
    "hedgehog_joint": MapTraits(double, sized=True),
    "taylor": MapTraits(lambda size: 1 + size + products(size), sized=True, signed=True),
    "rebased": MapTraits(products, sized=True, signed=True),
}


def map_width(name: str, dim: int, feature_dim: int) -> int:
    """Feature dimension K of a map on heads of `dim` channels."""
    return MAPS[name].width(feature_dim or dim)
