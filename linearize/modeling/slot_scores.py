"""What a token that leaves the window is worth: the slots keep those of the highest score, for each kv head."""

from __future__ import annotations

try:
    import torch
    from torch import Tensor, nn
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .gates import Projection
from .slots import Tokens
from .spec import MixerSpec, Shape

FLOOR = 1e-3  # of attention, before its logarithm: less is as good as none


class SlotScore(Projection):
    """s_i = w . x_i + b + a1 log r_i + a2 log^2 r_i + rate i of token i, x the layer's input, r the largest attention that it got
    in the window.

    Fitted to the log of the largest attention that the teacher's queries beyond the window give it, or of its root mean square.
    Unfitted it is log r.
    All slots age alike, so attention that fades by e^-rate a token is a fixed gain for those that came later.
    A choice has no gradient, so these parameters have none.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape.hidden_size, shape.kv_heads, 1)
        start = torch.tensor([1.0, 0.0]).repeat(shape.kv_heads, 1)
        self.attention = nn.Parameter(start)
        self.rate = nn.Parameter(torch.zeros(shape.kv_heads))

    def arrived(self, hidden: Tensor | None, position: Tensor) -> Tensor:
        """What is known of tokens (B, n) at these positions when they arrive: w . x + b + rate i (B, G, n, 1)."""
        found = self.project(hidden)
        return found + self.rate.to(found.dtype)[:, None, None] * position[:, None, :, None].to(found.dtype)

    def own(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """w (G, N), b and rate (G), and (a1, a2) (G, 2)."""
        assert self.bias is not None
        return self.up, self.bias, self.rate, self.attention

    def score(self, got: Tensor) -> Tensor:
        """Scores (B, G, n) of tokens that hold (attention r, w . x + b + rate i) (B, G, n, 2)."""
        columns = log_attention(got[..., 0])
        found: Tensor = got[..., 1] + (columns * self.attention.to(got.dtype)[:, None]).sum(-1)
        return found


def log_attention(attention: Tensor) -> Tensor:
    """(log r, log^2 r) of attention (...): (..., 2)."""
    log = attention.clamp(min=FLOOR).log()
    return torch.stack([log, log.square()], dim=-1)


def slot_score(spec: MixerSpec, tokens: Tokens, learned: SlotScore | None) -> Tensor:
    """Score (B, G, n) of tokens that leave: the attention they got, the memory's error on them, both, a small key, or as learnt."""
    if spec.slot_score == "norm":
        return -tokens["k"].detach().square().sum(-1).sqrt()
    scores = tokens["scores"].detach()
    return scores.prod(-1) if learned is None else learned.score(scores).detach()
