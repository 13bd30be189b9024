"""How tokens leave the window: into slots, or into the far memory; and what the slots give up follows them there."""

from __future__ import annotations

from dataclasses import dataclass

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .far import Far
from .frames import Frame
from .heads import join_in_heads, of_heads, with_heads
from .memory import FIELDS, State, stored
from .native import takes_frozen
from .native_slots import among_slots, read_stored
from .places import Place
from .products import LN2, LOG2E
from .slot_scores import SlotScore, slot_score
from .slots import Admission, Tokens, admit, recall_error
from .spec import MixerSpec, Shape
from .storage import EIGHT, FOUR, Change, kept, opened, opened_tokens, pair, rounded
from .window import Keys, Part, Scores, attend

ARRIVALS = 128  # at once, where their scores do not depend on what happens to those before them


@dataclass(frozen=True)
class Queries:
    """New tokens' queries: near (B, G, R, T, D), features (B, M, R', T, K) or None, routes (B, M, T, E) or None."""

    near: Tensor
    far: Tensor | None
    route: Tensor | None
    score: Scores


class Leaving(Far):
    """The far memory behind a window, and exact slots between the two."""

    def __init__(self, spec: MixerSpec, shape: Shape) -> None:
        super().__init__(spec, shape)
        self.ablate: str | None = None  # "far", "near" or "slots": that part is left out
        self.slot_score = SlotScore(shape) if spec.scores_learned else None

    @property
    def _more(self) -> tuple[tuple[int, ...], int]:
        return self.spec.more_heads, self.shape.kv_heads

    @property
    def takes_leavers(self) -> bool:
        return self.spec.has_far and self.spec.coverage == "older"

    def _enter(
        self, tokens: Tokens, valid: Tensor, position: Tensor, q: Tensor, far: Tensor, route: Tensor | None, one: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Tokens of the buffer go into the far memory, then queries q (B, M, R, T, K) read it."""
        arrivals = {name: tokens[name] for name in self.spec.arrivals(self.shape)}
        k, v = tokens.get("far_k", tokens["k"]), tokens.get("far_v", tokens["v"])
        entries = self.entries(k, v, arrivals, position, valid)
        return self.read(q, entries, far, route, terraced=0 if self.spec.block == 1 or one else self.spec.block, one=one)

    # ---- many tokens ----

    def leave(self, queries: Queries, joined: Tokens, state: State, after: State) -> tuple[Part | None, Tensor | None]:
        """Move what left the window in a call; `joined` (B, ., R + T, .) holds recent and new tokens, `after` takes the new state.

        Returns the part of the slots and the far read for each query.
        """
        spec, far = self.spec, None
        time, dtype = queries.near.shape[3], queries.near.dtype
        frame = Frame(spec, state["count"], after["count"], time, spec.window if spec.slots else spec.block)
        if self.takes_leavers:
            far = state["far"].to(dtype)
        tokens = {name: frame.leaving(x) for name, x in joined.items()}
        if not spec.slots:
            if far is None or queries.far is None:
                return None, None
            route = None if queries.route is None else frame.queries(queries.route[:, :, None])[:, :, 0]
            read, far = self._enter(tokens, frame.valid, frame.position, frame.queries(queries.far), far, route)
            after["far"] = stored(far, state["far"].dtype, after["count"])
            return None, frame.back(read)
        return self._leave_through_slots(queries, frame, tokens, joined, state, after, far)

    def _leave_through_slots(
        self, queries: Queries, frame: Frame, tokens: Tokens, joined: Tokens, state: State, after: State, far: Tensor | None
    ) -> tuple[Part | None, Tensor | None]:
        """Some windows' length of arrivals after another: one, where a score reads the memory as it was at that boundary, and where
        all queries of a block read what its arrivals leave; all at once, where a kernel has them read."""
        spec, dtype = self.spec, queries.near.dtype
        length = spec.window * (1 if spec.scores_recall or spec.block > 1 else max(1, ARRIVALS // spec.window))
        if not spec.scores_recall and spec.block == 1 and by_kernel(queries.score, queries.near, tokens["k"], tokens["v"]):
            length = len(frame)
        near = frame.queries(queries.near).split(length, dim=3)  # a slice's gradient is as large as the whole, for each
        features = None if queries.far is None else frame.queries(queries.far).split(length, dim=3)
        route = None if queries.route is None else frame.queries(queries.route[:, :, None])[:, :, 0].split(length, dim=2)
        pieces = {name: x.split(length, dim=2) for name, x in tokens.items()}
        slots, more, parts, reads, scores = held(state, dtype), held(state, dtype, "more"), [], [], []
        for number, start in enumerate(range(0, len(frame), length)):
            block = slice(start, start + length)
            own = {name: x[number] for name, x in pieces.items()}
            valid, position = frame.valid[:, block], frame.position[:, block]
            if far is not None and spec.scores_recall:
                begins = (frame.query[:, start] < after["count"]) & (start >= frame.offset)
                own["scores"] = self._recalled(own, position, begins, far)
                scores.append(own["scores"])
            admission = admit(slots, self._competing(own, own, rounded), valid)
            further = self._admit_more(more, admission) if more else None
            slots, more = admission.slots, more if further is None else further.slots
            if self.ablate != "slots":
                parts.append(self._slots_part(near[number], admission, further, queries.score))
            if far is not None and features is not None:
                losers, out = self._out_of_all(admission, further)
                own_route = None if route is None else route[number]
                read, far = self._enter(losers, out, position, features[number], far, own_route)
                reads.append(read)
        after.update(kept_slots(slots, state) | kept_slots(more, state, "more"))
        if scores:
            joined["scores"] = put_back(joined["scores"], torch.cat(scores, 2), frame.source)
        if far is not None:
            after["far"] = stored(far, state["far"].dtype, after["count"])
        found = frame.back(torch.cat(reads, dim=3)) if reads else None
        if not parts:
            return None, found
        numerator, denominator, top = (
            torch.cat([getattr(part, name) for part in parts], dim=3) for name in ("numerator", "denominator", "top")
        )
        return Part(frame.back(numerator), *(frame.back(x[..., None])[..., 0] for x in (denominator, top))), found

    def _competing(self, tokens: Tokens, rows: Tokens, store: Change) -> Tokens:
        """Tokens that leave as slots take them, with their score: `rows` of them, brought to the slots' own dtype by `store`."""
        found = {name: x for name, x in rows.items() if name != "scores"}
        if self.spec.slot_dtype == "int4":  # whether they stay or not: what slots give up later is what they were given
            found["k"], found["v"] = pair(store, tokens["k"], tokens["v"], FOUR)
        return {**found, "score": slot_score(self.spec, tokens, self.slot_score)}

    def _admit_more(self, more: Tokens, admission: Admission) -> Admission:
        """What slots give up competes for the further ones of the heads that have them: together they hold the best of all."""
        return admit(more, {name: of_heads(x, *self._more) for name, x in admission.losers().items()}, admission.out)

    def _out_of_all(self, admission: Admission, further: Admission | None) -> tuple[Tokens, Tensor]:
        """Tokens (B, ., n, .) that neither slots nor further ones keep, and which of these are there, (B, n) or (B, G, n)."""
        losers, out = admission.losers(), admission.out
        if further is None:
            return losers, out
        (heads, kv), own = self._more, further.losers()
        every, some = (x[:, None].expand(-1, count, -1) for x, count in ((out, kv), (further.out, len(heads))))
        return {name: with_heads(x, own[name], heads, kv) for name, x in losers.items()}, with_heads(every, some, heads, kv)

    def _recalled(self, tokens: Tokens, position: Tensor, begins: Tensor, far: Tensor) -> Tensor:
        """Scores (B, G, n, .) with the memory's recall error of those tokens where a window's length `begins` (B,)."""
        scores = tokens["scores"]
        with torch.no_grad():
            arrivals = {name: tokens[name] for name in self.spec.arrivals(self.shape)}
            k, v = tokens.get("far_k", tokens["k"]), tokens.get("far_v", tokens["v"])
            error = recall_error(self.recall(k, v, arrivals, position, far), v, self.spec.normalise)
            due = begins[:, None, None] & (position >= self.spec.sinks)[:, None]
            last = torch.where(due, error, scores[..., -1])
            return torch.cat([scores[..., :-1], last[..., None]], dim=-1)

    def _slots_part(self, q: Tensor, admission: Admission, further: Admission | None, score: Scores) -> Part:
        """Queries (B, G, R, n, D) of the arrivals' times over slots, and over the further ones of the heads that have them."""
        part = self._slot_part(q, admission, score)
        if further is None:
            return part
        return join_in_heads(part, self._slot_part(of_heads(q, *self._more), further, score), *self._more)

    def _slot_part(self, q: Tensor, admission: Admission, score: Scores) -> Part:
        """Queries (B, G, R, n, D) of the arrivals' times over the slots as they were then."""
        tokens, new, whole = admission.candidates, q.shape[3], self.spec.block > 1  # blocks leave whole, before their queries
        k, v = tokens["k"], tokens["v"]
        if by_kernel(score, q, k, v):
            gone = admission.gone.where(admission.gone == new, 0) if whole else admission.gone
            shown = k.shape[2] - (0 if whole else new)
            numerator, denominator, top = among_slots(q, k, v, gone, shown, score.scale * LOG2E)
            return Part(numerator, denominator, top * LN2)
        member = admission.member
        if whole:
            member = member[..., -1:, :].expand_as(member)
        return attend(q.unsqueeze(3), Keys(k[:, :, None], v[:, :, None], member[:, :, None]), score)[0]

    # ---- one token ----

    def leave_step(self, queries: Queries, state: State, after: State, place: Place) -> Tensor | None:
        """The same for one new token, on whole buffers; returns the far read."""
        spec, dtype, valid = self.spec, queries.near.dtype, place.valid
        far = state["far"].to(dtype) if self.takes_leavers else None
        if spec.scores_recall and far is not None:
            after["scores"] = self._score_recent(state, far, dtype)
        tokens: Tokens = {}
        if spec.block == 1 or bool(valid.any()):
            rows = {name: place.take(after[name]) for name in FIELDS if name in after}
            tokens = opened_tokens(rows, dtype)
            if spec.slots:
                tokens, valid = self._admit_step(self._competing(tokens, rows, kept), state, after, valid, dtype)
        if far is None or queries.far is None:
            return None
        position = place.old
        if spec.block > 1:
            far, tokens, valid, position = self._enter_block(tokens, valid, position, far, state, queries)
        read, far = self._enter(tokens, valid, position, queries.far, far, queries.route, one=True)
        after["far"] = stored(far, state["far"].dtype, after["count"])
        return read

    def _admit_step(self, rows: Tokens, state: State, after: State, valid: Tensor, dtype: torch.dtype) -> tuple[Tokens, Tensor]:
        """What no slot keeps of tokens that leave, opened, where a memory takes it. They compete as they are stored: those in slots
        are not opened."""
        admission = admit(held(state), rows, valid)
        after.update({f"slot_{name}": x for name, x in admission.slots.items()})
        further = self._admit_more(held(state, place="more"), admission) if self.spec.more_slots else None
        if further is not None:
            after.update({f"more_{name}": x for name, x in further.slots.items()})
        if not self.takes_leavers:
            return {}, valid
        lost, out = self._out_of_all(admission, further)
        return opened_tokens(lost, dtype), out

    def with_slots(self, near: Part, q: Tensor, state: State, score: Scores) -> Part:
        """The near part of one query (B, G, R, 1, D) with the slots as they are stored, by a kernel."""
        return near.join(_stored_part(q, state, "slot", score))

    def with_more(self, near: Part, q: Tensor, state: State, score: Scores) -> Part:
        """The near part of one query (B, G, R, 1, D) with the further slots of the heads that have them."""
        q = of_heads(q, *self._more)
        if reads_stored(score, q, state):
            return join_in_heads(near, _stored_part(q, state, "more", score), *self._more)
        tokens = held(state, q.dtype, "more")
        group = Keys(tokens["k"][:, :, None], tokens["v"][:, :, None], (tokens["score"] > -torch.inf)[:, :, None, None])
        return join_in_heads(near, attend(q.unsqueeze(3), group, score)[0], *self._more)

    def _enter_block(
        self, tokens: Tokens, valid: Tensor, position: Tensor, far: Tensor, state: State, queries: Queries
    ) -> tuple[Tensor, Tokens, Tensor, Tensor]:
        """A block that is due goes in; then a token that does not, for the query to read after it."""
        if tokens:
            assert queries.far is not None
            q = queries.far.expand(-1, -1, -1, self.spec.block, -1)
            route = None if queries.route is None else queries.route.expand(-1, -1, self.spec.block, -1)
            far = self._enter(tokens, valid, position, q, far, route)[1]
        first = {name: opened(state[name][:, :, :1], far.dtype) for name in FIELDS if name in state}
        return far, first, torch.zeros_like(position[:, :1], dtype=torch.bool), position[:, :1]

    def _score_recent(self, state: State, far: Tensor, dtype: torch.dtype) -> Tensor:
        """The ring's scores, with the recall error of the tokens that leave next where a window's length begins."""
        spec, count, scores = self.spec, state["count"], state["scores"]
        begins = count % spec.window == 0
        if not bool(begins.any()):
            return scores
        offsets = torch.arange(spec.window, device=count.device)
        index = (count[:, None] + offsets) % spec.recent
        tokens = {name: opened(gather(state[name], index), dtype) for name in FIELDS if name in state}
        found = self._recalled(tokens, (count - spec.recent)[:, None] + offsets, begins, far)
        return scores.scatter(2, index[:, None, :, None].expand_as(found), found.to(scores.dtype))


def by_kernel(score: Scores, *tensors: Tensor) -> bool:
    """Whether a kernel has queries read slots."""
    return score.softcap is None and takes_frozen(*tensors, traced=True)


def reads_stored(score: Scores, q: Tensor, state: State) -> bool:
    """Whether a kernel has one token's queries read slots as they are stored."""
    scores, k, v = (state.get(f"slot_{name}") for name in ("score", "k", "v"))
    return k is not None and by_kernel(score, q, *(x for x in (scores, k, v) if x is not None and x.dtype not in (EIGHT, FOUR)))


def _stored_part(q: Tensor, state: State, place: str, score: Scores) -> Part:
    k, v, worth = (state[f"{place}_{name}"] for name in ("k", "v", "score"))
    numerator, denominator, top = read_stored(q, k, v, worth, score.scale * LOG2E)
    return Part(numerator, denominator, top * LN2)


def held(state: State, dtype: torch.dtype | None = None, place: str = "slot") -> Tokens:
    """The slots' tokens, or the further ones', opened in a dtype or as they are stored; their scores keep their own dtype."""
    found = {name.removeprefix(f"{place}_"): x for name, x in state.items() if name.startswith(f"{place}_")}
    if dtype is None or not found:
        return found
    score = found.pop("score")
    return {**opened_tokens(found, dtype), "score": score}


def kept_slots(slots: Tokens, state: State, place: str = "slot") -> State:
    """Tokens in slots, as the state stores them."""
    return {f"{place}_{name}": kept(x, state[f"{place}_{name}"].dtype) for name, x in slots.items()}


def gather(ring: Tensor, index: Tensor) -> Tensor:
    """Tokens of a buffer (B, h, L, D) at places `index` (B, n) of its ring."""
    return ring.gather(2, index[:, None, :, None].expand(-1, ring.shape[1], -1, ring.shape[3]))


def put_back(joined: Tensor, values: Tensor, source: Tensor) -> Tensor:
    """Values (B, G, P, w) of a frame's places in the buffer (B, G, R + T, w) that they came from at `source` (B, P)."""
    size = joined.shape[2]
    spare = torch.nn.functional.pad(joined, (0, 0, 0, 1))  # places outside the buffer write there
    index = torch.where((source >= 0) & (source < size), source, size)
    spare = spare.scatter(2, index[:, None, :, None].expand(joined.shape[0], joined.shape[1], -1, joined.shape[3]), values)
    return spare[:, :, :size]
