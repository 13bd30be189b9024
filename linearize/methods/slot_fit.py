"""A learnt slot score in closed form: which tokens will the teacher still look at, once they have left the window?"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.methods.calibration import Calibration
from linearize.modeling.mixer import Mixer
from linearize.modeling.native import takes_frozen
from linearize.modeling.native_ops import received
from linearize.modeling.products import LOG2E
from linearize.modeling.slot_scores import FLOOR, SlotScore, log_attention
from linearize.modeling.spec import MixerSpec, Shape

RIDGE = 1e-3
OWN = 2  # columns of the attention that a token got
LEAST = {"largest": FLOOR, "mean_square": 2e-5}  # of attention, before its logarithm: less is as good as none
FADE_TOKENS = 1024  # in which a score falls behind by its `slot_fade`


class ScoreFit:
    """Ridge regression, a kv head, of log max_t A_ti over the queries t beyond the window, on the layer's input and the attention
    that token i got inside it, as KVpop (arXiv:2607.05061) and KVzap (arXiv:2601.07891) do by gradient. Or of log (mean_t A_ti^2)^½
    (`slot_target`): an output is off by squares where the token is missing, so one that many queries need counts for more than one
    that a single query does. The rate at which a score fades is not fitted, see `set_rates`: the one of the least output error
    forgets too fast.

    Rows are added in any parts: only sums are kept. Only tokens that leave the window early enough to be looked at for as long
    again are counted; where no row is that long, the score stays as it is.
    """

    def __init__(self, spec: MixerSpec, shape: Shape) -> None:
        self.spec, self.shape = spec, shape
        size = shape.hidden_size + 1 + OWN
        self.left = torch.zeros(shape.kv_heads, size, size, dtype=torch.float64)  # X^T X and X^T y of columns X
        self.right = torch.zeros(shape.kv_heads, size, dtype=torch.float64)

    def add(self, calibration: Calibration) -> None:
        """Take in what the teacher does on these rows."""
        hidden, spec = calibration.inputs.hidden, self.spec
        counted = slice(spec.sinks, calibration.target.shape[1] - 2 * spec.recent)
        if hidden is None or counted.stop - counted.start < 1:
            return
        got, wanted = attention_inside_and_beyond(spec, self.shape.kv_heads, calibration)
        x = hidden[:, counted].flatten(0, 1).float()
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=-1)
        gram, cut = (x.T @ x).double(), x.shape[1]
        for head in range(self.shape.kv_heads):
            own = log_attention(got[:, head, counted].flatten()).to(x)
            target = wanted[:, head, counted].flatten().clamp(min=LEAST[spec.slot_target]).log().to(x)
            across = (x.T @ own).double()
            whole = torch.cat([torch.cat([gram, across], 1), torch.cat([across.T, (own.T @ own).double()], 1)])
            self.left[head] += whole.to(self.left)
            self.right[head, :cut] += (x.T @ target).to(self.right)
            self.right[head, cut:] += (own.T @ target).to(self.right)

    def solved(self) -> SlotScore:
        """The score of the rows so far."""
        learned = SlotScore(self.shape)
        assert learned.bias is not None
        for head, (left, right) in enumerate(zip(self.left, self.right, strict=True)):
            if bool(left.any()):
                size = RIDGE * left.diagonal().mean() * torch.eye(len(left), dtype=left.dtype)
                weight = torch.linalg.solve(left + size, right).to(learned.up)
                learned.up.data[head], learned.attention.data[head] = weight[: -OWN - 1], weight[-OWN:]
                learned.bias.data[head] = weight[-OWN - 1]
        return learned


def set_rates(mixer: Mixer) -> None:
    """Scores fade as the spec says, in all kv heads alike."""
    if mixer.slot_score is not None:
        mixer.slot_score.rate.data.fill_(mixer.spec.slot_fade / FADE_TOKENS)


def attention_inside_and_beyond(spec: MixerSpec, groups: int, calibration: Calibration) -> tuple[Tensor, Tensor]:
    """The largest attention of a query that each token gets from more than an eighth of the window away while it is in the window,
    of what sinks and window then share out; and from beyond the window, of the teacher's own, or its root mean square there if that
    is the spec's `slot_target`: each (B, G, T)."""
    q, k, score = calibration.inputs.q, calibration.inputs.k, calibration.inputs.score
    places = torch.arange(q.shape[2], device=q.device)
    first = places - spec.window + 1 if spec.block == 1 else (places // spec.window - 1) * spec.window  # in a query's window
    readers = q.shape[1] // groups * (len(places) - torch.searchsorted(first, places, right=True)).clamp(min=1)
    squares = spec.slot_target == "mean_square"
    if score.softcap is None and score.sliding is None and k.shape[1] == groups and takes_frozen(q, k):
        inside, beyond = received(q, k, first, spec.sinks, spec.window // 8, score.scale * LOG2E, squares)
        return inside.exp_(), beyond.div_(readers).sqrt_() if squares else beyond.exp_()
    inside = torch.full((q.shape[0], groups, q.shape[2]), -torch.inf, device=q.device)  # logarithms
    beyond = torch.zeros(inside.shape, dtype=torch.float64, device=q.device) if squares else inside.clone()

    def most(found: Tensor, keys: Tensor, scores: Tensor) -> None:
        own = scores.unflatten(1, (groups, -1)).amax((2, 3))
        found[..., keys] = torch.maximum(found[..., keys], own.to(found.dtype))

    def summed(found: Tensor, keys: Tensor, scores: Tensor) -> None:
        found[..., keys] += (2 * scores).exp().unflatten(1, (groups, -1)).sum((2, 3))

    note = summed if squares else most
    for block, scores in calibration.rows():
        queries, mass = places[block, None], scores.logsumexp(-1, keepdim=True)
        gone = max(int(first[block.start]), 0)  # keys before this one have left the window of all queries of the block
        gone = gone if gone > spec.sinks else 0
        keys = torch.cat([places[: min(spec.sinks, gone)], places[gone : block.stop]])
        near, out = scores[..., keys], keys < first[block, None]
        exact = near.masked_fill(out & (keys >= spec.sinks), -torch.inf)
        shares = exact - exact.logsumexp(-1, keepdim=True)
        most(inside, keys, shares.masked_fill(queries - keys <= spec.window // 8, -torch.inf))
        note(beyond, keys, (near - mass).masked_fill(~out, -torch.inf))
        left = slice(min(spec.sinks, gone), gone)
        note(beyond, places[left], scores[..., left].sub_(mass))
    return inside.exp(), (beyond / readers).sqrt().to(inside.dtype) if squares else beyond.exp()
