"""Many arrivals at once leave in the slots what each of them, one after another, would."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linearize.modeling.heads import of_heads, with_heads
from linearize.modeling.slots import Tokens, admit
from linearize.testing.oracle import compete

HEADS = 2


def tokens(score: Tensor, first: int) -> Tokens:
    """With their number as key: (B, G, n, 1)."""
    number = torch.arange(first, first + score.shape[2], dtype=torch.double)
    return {"k": number[:, None].expand(*score.shape, 1), "score": score}


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("new", [1, 2, 5, 9])
@pytest.mark.parametrize("levels", [3, 1000])
@pytest.mark.parametrize("filled", [0, 2, 8])
def test_arrivals_compete_one_after_another(size: int, new: int, levels: int, filled: int) -> None:
    """Who is in a slot after each, who loses its place to each, and what the slots hold at the end, in which order; few `levels`
    are ties, and an arrival that is not there changes nothing."""
    draw = torch.Generator().manual_seed(97 * size + 13 * new + levels + filled)
    filled, rows = min(filled, size), 8
    old, came = (torch.randint(levels, (rows, HEADS, n), generator=draw).double() for n in (size, new))
    old[..., filled:] = -torch.inf
    there = torch.rand(rows, new, generator=draw) < 0.8
    found = admit(tokens(old, 0), tokens(came, size), there)
    for row in range(rows):
        for head in range(HEADS):
            own = {j: float(old[row, head, j]) for j in range(filled)}
            for i in range(new):
                lost = compete(own, size + i, float(came[row, head, i]), size) if there[row, i] else None
                assert found.member[row, head, i].nonzero()[:, 0].tolist() == sorted(own)
                assert bool(found.out[row, i]) == (lost is not None)
                assert lost is None or lost == int(found.lost[row, head, i]) == int(found.losers()["k"][row, head, i])
            left, score = found.slots["k"][row, head, :, 0], found.slots["score"][row, head]
            assert left[: len(own)].tolist() == sorted(own)
            assert score.tolist() == [own[j] for j in sorted(own)] + [-torch.inf] * (size - len(own))


@pytest.mark.parametrize("heads", [(0,), (2,), (0, 1), (1, 3), (3, 1), (2, 3, 0), (0, 1, 2, 3)])
@pytest.mark.parametrize("share", [1, 3])
def test_some_heads_of_all(heads: tuple[int, ...], share: int) -> None:
    """Their rows, in any order, and the whole with other ones in their places."""
    x, own = torch.randn(2, 4 * share, 5), torch.randn(2, len(heads) * share, 5)
    rows = [head * share + i for head in heads for i in range(share)]
    assert torch.equal(of_heads(x, heads, 4), x[:, rows])
    expected = x.clone()
    expected[:, rows] = own
    assert torch.equal(with_heads(x, own, heads, 4), expected)
