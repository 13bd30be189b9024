"""The layers of a network with mixers, and how their activations are computed again instead of kept."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def blocks(model: Any) -> list[nn.Module]:
    """The layers of the network that hold the converted attention modules, and those between them: units of sharding."""
    path = model.config.linearize["layers"][0]["module"].split(".")
    for end in range(len(path), 0, -1):
        found = model.get_submodule(".".join(path[:end]))
        if isinstance(found, nn.ModuleList):
            return list(found)
    return []


def checkpointed(model: Any) -> None:
    """Let every layer compute its activations again in the backward pass instead of keeping them (Chen et al. 2016).

    Not by transformers' own switch, which asks for training mode: some families' dropout would begin with it.
    """
    for block in blocks(model):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


@contextmanager
def recomputing(model: Any) -> Iterator[None]:
    """The same for a while."""
    before = [(block, vars(block).get("forward")) for block in blocks(model)]
    checkpointed(model)
    try:
        yield
    finally:
        for block, own in before:
            del block.forward
            if own is not None:
                block.forward = own
