"""A learnt slot score in closed form: which tokens will the teacher still look at, once they have left the window?"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.methods.calibration import Calibration
from linearize.modeling.mixer import Mixer
from linearize.modeling.slot_scores import log_attention

RIDGE = 1e-3
FADE_TOKENS = 1024  # in which a score falls behind by its `slot_fade`


def fit_slot_score(mixer: Mixer, calibration: Calibration) -> None:
    """Ridge regression, a kv head, of log max_t A_ti over the queries t beyond the window, on the layer's input and the attention
    that token i got inside it, as KVpop (arXiv:2607.05061) and KVzap (arXiv:2601.07891) do by gradient. The rate at which a score
    fades is not fitted, see `set_rates`: the one of the least output error forgets too fast.

    Only tokens that leave the window early enough to be looked at for as long again are counted; rows shorter than that leave
    the score as it is.
    """
    learned, hidden, spec = mixer.slot_score, calibration.inputs.hidden, mixer.spec
    if learned is None or hidden is None:
        return
    time = hidden.shape[1]
    counted = slice(spec.sinks, time - 2 * spec.recent)
    if counted.stop - counted.start < 1:
        return
    got, wanted = attention_inside_and_beyond(mixer, calibration)
    x = hidden[:, counted].flatten(0, 1).float()
    x = torch.cat([x, torch.ones_like(x[:, :1])], dim=-1)
    gram = (x.T @ x).double()
    for head in range(mixer.shape.kv_heads):
        own = log_attention(got[:, head, counted].flatten())
        target = log_attention(wanted[:, head, counted].flatten())[:, 0]
        weight = ridge(x, gram, own, target)
        learned.up.data[head], learned.attention.data[head] = weight[: x.shape[1] - 1], weight[x.shape[1] :]
        assert learned.bias is not None
        learned.bias.data[head] = weight[x.shape[1] - 1]


def set_rates(mixer: Mixer) -> None:
    """The scores of each kv head fade as the spec says."""
    if mixer.slot_score is not None:
        fades = [mixer.spec.more_fade if g in mixer.spec.more_heads else mixer.spec.slot_fade for g in range(mixer.shape.kv_heads)]
        mixer.slot_score.rate.data.copy_(torch.tensor(fades) / FADE_TOKENS)


def ridge(x: Tensor, gram: Tensor, own: Tensor, target: Tensor) -> Tensor:
    """Weights (C + 2,) of columns x (N, C), whose gram matrix is known, and own (N, 2) against target (N,)."""
    across = (x.T @ own).double()
    whole = torch.cat([torch.cat([gram, across], 1), torch.cat([across.T, (own.T @ own).double()], 1)])
    size = RIDGE * whole.diagonal().mean() * torch.eye(len(whole), dtype=whole.dtype, device=whole.device)
    right = torch.cat([x.T @ target, own.T @ target]).double()
    solution: Tensor = torch.linalg.solve(whole + size, right)
    return solution.to(x.dtype)


def attention_inside_and_beyond(mixer: Mixer, calibration: Calibration) -> tuple[Tensor, Tensor]:
    """The largest attention of a query that each token gets from more than an eighth of the window away while it is in the window,
    of what sinks and window then share out; and from beyond the window, of the teacher's own: each (B, G, T)."""
    spec, groups, q = mixer.spec, mixer.shape.kv_heads, calibration.inputs.q
    inside, beyond = (torch.full((q.shape[0], groups, q.shape[2]), -torch.inf, device=q.device) for _ in range(2))  # logarithms
    places = torch.arange(q.shape[2], device=q.device)
    first = places - spec.window + 1 if spec.block == 1 else (places // spec.window - 1) * spec.window  # in a query's window

    def note(found: Tensor, keys: Tensor, scores: Tensor) -> None:
        most = scores.amax(2).unflatten(1, (groups, -1)).amax(2).to(found.dtype)
        found[..., keys] = torch.maximum(found[..., keys], most)

    for block, scores in calibration.rows():
        queries, mass = places[block, None], scores.logsumexp(-1, keepdim=True)
        gone = max(int(first[block.start]), 0)  # keys before this one have left the window of all queries of the block
        gone = gone if gone > spec.sinks else 0
        keys = torch.cat([places[: min(spec.sinks, gone)], places[gone : block.stop]])
        near, out = scores[..., keys], keys < first[block, None]
        exact = near.masked_fill(out & (keys >= spec.sinks), -torch.inf)
        shares = exact - exact.logsumexp(-1, keepdim=True)
        note(inside, keys, shares.masked_fill(queries - keys <= spec.window // 8, -torch.inf))
        note(beyond, keys, (near - mass).masked_fill(~out, -torch.inf))
        note(beyond, places[:gone], scores[..., :gone].sub_(mass))
    return inside.exp(), beyond.exp()
