"""A mixer on one part of a text, the other parts in other processes: exact, and so are its gradients.

The state that a cache would hold before the part is put together from three sources: the window and what convolutions remember
from the last tokens of the process on the left, the sinks from wherever the document begins, the memory from a gather of what each
part does to it. Then the part runs as any call on a filled cache does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from linearize.distillation.collectives import from_left
from linearize.distillation.sequence_memory import Summary, applied, gathering, incoming, summed
from linearize.modeling.memory import FIELDS, State, empty_state, fill_sinks
from linearize.modeling.mixer import Mixer
from linearize.modeling.products import without_autocast
from linearize.modeling.rows import Rows, make_rows
from linearize.modeling.spec import MixerSpec
from linearize.modeling.stream import Halves, Inputs

BY_HEAD = ("q", "k", "v", "raw_q", "raw_k")
BY_TOKEN = ("hidden", "cos", "sin")
Scatter = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Part:
    """One process's part of B rows: part n of a text is in process n of `group`.

    `before` (B,) counts the tokens that the document which is open where the part begins has in earlier parts: 0 in the first.
    """

    group: dist.ProcessGroup
    before: Tensor


def refusal(spec: MixerSpec) -> str | None:
    """Why a mixer cannot be split over processes, or None."""
    if not spec.causal:
        return "a bidirectional layer reads whole texts"
    if spec.scores_recall:
        return f"slot_score '{spec.slot_score}' reads the memory as it was at each token, which only the process before knows"
    if spec.slots:
        return "slots are given away in order, token by token"
    if spec.kv_dtype != "model":
        return f"exact tokens pass from process to process as they are: kv_dtype 'model', not '{spec.kv_dtype}'"
    return None


def reach(spec: MixerSpec) -> int:
    """How many tokens before a part its tokens read as they are: a part must be at least as long."""
    return (spec.recent if spec.has_near else 0) + (spec.conv - 1 if spec.conv and spec.has_far else 0)


def shortest(spec: MixerSpec) -> int:
    """Fewest tokens of a part; one alone would be a step of decoding."""
    return max(reach(spec), 2)


def halves(mixer: Mixer, inputs: Inputs, part: Part) -> tuple[Halves, Scatter]:
    """Both halves of a mixer at the tokens of this part, were the parts of all processes one text, in rows of single documents.

    And what brings anything of those rows (rows, h, L, .) to the part's places (B, h, T, .). `inputs.segments` numbers the
    documents of this part alone. Every process of the group must call it. ValueError for mixers that cannot be split, for pads,
    and for parts shorter than `shortest`.
    """
    spec = mixer.spec
    why = refusal(spec)
    if why is None and inputs.q.shape[2] < shortest(spec):
        why = f"a part of {inputs.q.shape[2]} tokens is shorter than the {shortest(spec)} that this mixer's window needs"
    if why is None and inputs.mask is not None and not bool(inputs.mask.all()):
        why = "rows with pads are not split: pack them"
    if why is not None:
        raise ValueError(f"sequence parallel: {why}")
    rows = padded = None
    own = replace(inputs, mask=None)
    if inputs.segments is not None:
        batch, _, time, _ = inputs.q.shape
        rows = make_rows(None, inputs.segments, batch, time, inputs.q.device)
    place = _Place(part, rows, inputs.q.shape[0])
    if rows is not None:
        own = in_rows(inputs, rows)
        padded = make_rows(own.mask, None, own.q.shape[0], own.q.shape[2], inputs.q.device)
    state = place.entering(carried(mixer, inputs, own, place), mixer, own)
    with _memory_of_all(mixer, place):
        found = mixer.halves(own, padded, state)

    def scatter(x: Tensor) -> Tensor:
        return x if rows is None or padded is None else rows.scatter(padded.scatter(x))

    return found, scatter


def mix(mixer: Mixer, inputs: Inputs, part: Part) -> Tensor:
    """What `mixer(inputs)[0]` would be at the tokens of this part (B, T, H, V): see `halves`."""
    with without_autocast(inputs.q):
        found, scatter = halves(mixer, inputs, part)
        return scatter(mixer.combine(found)).transpose(1, 2).to(inputs.q.dtype)


def in_rows(inputs: Inputs, rows: Rows) -> Inputs:
    """Each document of the part as a row of its own, with pads behind; two tokens at least, since one would be a step."""
    batch = rows.row.shape[0]
    pieces: dict[str, Any] = {}
    for name in (*BY_HEAD, *BY_TOKEN):
        x = getattr(inputs, name)
        if x is not None:
            x = x if name in BY_HEAD else x.expand(batch, *x.shape[1:])[:, None]
            x = torch.nn.functional.pad(rows.gather(x), (0, 0, 0, 1))
            pieces[name] = x if name in BY_HEAD else x[:, 0]
    mask = torch.nn.functional.pad(rows.valid, (0, 1))
    return replace(inputs, **_unturned(pieces, mask), mask=mask, segments=None)


def _unturned(pieces: dict[str, Any], mask: Tensor) -> dict[str, Any]:
    """With a cosine of 1 at pads, whose RoPE is undone by a division."""
    cos = pieces.get("cos")
    return pieces if cos is None else {**pieces, "cos": cos.where(mask[..., None], 1.0)}


class _Place:
    """Which of a part's rows (one a document) goes on from the part before, and which one is open at its end, for each of B."""

    def __init__(self, part: Part, rows: Rows | None, batch: int) -> None:
        self.group, self.before = part.group, part.before
        every = torch.arange(batch, device=part.before.device)
        self.first = every if rows is None else rows.row[:, 0]
        self.last = every if rows is None else rows.row[:, -1]
        self.count = batch if rows is None else len(rows.lengths)
        self.goes_on = part.before > 0
        self.through = self.goes_on & (self.first == self.last)  # one document from end to end

    def take(self, spec: MixerSpec, mine: Summary) -> Tensor:
        """The memory (rows, M, K, V) before each row's first token, from the summary of this part's rows."""
        transition, added = (x[self.last] for x in mine)
        found = incoming((transition * _like(self.through, transition), added), self.group, lambda a, s: applied(spec, a, s))
        return self.spread(found, torch.zeros_like(mine[1]))

    def spread(self, found: Tensor, blank: Tensor) -> Tensor:
        """What the document open before the part left (B, ...), in its row; `blank` (rows, ...) in the others."""
        kept = found.where(_like(self.goes_on, found).bool(), blank[self.first])
        return kept if self.count == len(self.first) else blank.index_copy(0, self.first, kept)

    def entering(self, carried: State, mixer: Mixer, own: Inputs) -> State:
        """The state before each row's first token, from what is carried into the part (B, ...)."""
        blank = empty_state(mixer.spec, mixer.shape, self.count, own.k.dtype, own.k.device)
        state = {name: self.spread(carried[name], x) if name in carried else x for name, x in blank.items()}
        if mixer.spec.has_far:  # taken from the gather instead, and never rounded to a storage dtype between parts
            state["far"] = blank["far"].to(torch.promote_types(own.q.dtype, torch.float32))
        return state


def _like(flag: Tensor, x: Tensor) -> Tensor:
    return flag.view(-1, *[1] * (x.dim() - 1)).to(x.dtype)


def carried(mixer: Mixer, inputs: Inputs, own: Inputs, place: _Place) -> State:
    """Count, window, convolution inputs and sinks of the document that is open where the part begins, (B, ...) each."""
    spec, state = mixer.spec, {"count": place.before}
    if reach(spec):
        state |= _halo(mixer, inputs, place)
    if spec.has_near and spec.sinks:
        batch, size = len(place.before), spec.sinks
        start = place.before * place.through  # of the row that is open at the end
        length = own.k.shape[2] if own.mask is None else own.mask.sum(1)[place.last]
        mine = []
        for x in (own.k, own.v):
            x = x[place.last]
            empty = x.new_zeros(batch, x.shape[1], size, x.shape[3])
            mine.append(fill_sinks(empty, x, start, start + length))
        sinks = summed(mine, place.through, place.group)
        state |= {n: torch.cat([state[n][:, :, : -spec.sinks], x.to(state[n].dtype)], 2) for n, x in zip("kv", sinks, strict=True)}
    return state


def _halo(mixer: Mixer, inputs: Inputs, place: _Place) -> State:
    """What the last tokens on the left leave in a state, by running them again here: their window and convolution inputs."""
    spec, width = mixer.spec, reach(mixer.spec)
    names = [name for name in (*BY_HEAD, *BY_TOKEN) if getattr(inputs, name) is not None]
    if not (spec.conv and spec.has_far):  # then the queries leave nothing
        names = [name for name in names if name not in ("q", "raw_q")]
    tails = [_tail(getattr(inputs, name), 2 if name in BY_HEAD else 1, width) for name in names]
    got: dict[str, Any] = dict(zip(names, from_left(tails, place.group), strict=True))
    got.setdefault("q", torch.zeros_like(_tail(inputs.q, 2, width)))
    real = place.before.clamp(max=width)
    mask = torch.arange(width, device=real.device) >= width - real[:, None]
    tokens = replace(inputs, **{"raw_q": None, **_unturned(got, mask)}, mask=mask, segments=None)
    state = empty_state(spec, mixer.shape, len(real), inputs.k.dtype, inputs.k.device)
    state["count"] = place.before - real
    after = Mixer.forward(mixer, tokens, state, keep=True)[1]
    assert after is not None
    return {name: x for name, x in after.items() if name in FIELDS or name.startswith("conv_")}


def _tail(x: Tensor, dim: int, width: int) -> Tensor:
    return x.narrow(dim, x.shape[dim] - width, width)


@contextmanager
def _memory_of_all(mixer: Mixer, place: _Place) -> Iterator[None]:
    """Let the mixer's far memory begin where the parts before have left it."""
    if not mixer.spec.has_far:
        yield
        return
    own = mixer.engine
    mixer.engine = (gathering(mixer.spec, own[0], lambda mine: place.take(mixer.spec, mine)), own[1])
    try:
        yield
    finally:
        mixer.engine = own
