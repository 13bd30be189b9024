"""What each layer would cost as each candidate: KL to the teacher on text, and what recall loses, to second order.

With g_t the gradient of log p(y) by the output of a layer's attention at token t, y drawn from the teacher itself, and d_t by how
much a candidate's output is off, KL = 1/2 E (sum_t g_t d_t)^2, the Fisher form; errors of tokens and layers count as independent,
so one backward pass of the teacher serves all candidates of all layers; what g_t d_t is of each kv head tells what a layer costs
whose heads have different numbers of slots. Where something said before is asked for, the teacher is
so sure of its answer that log p hardly moves: there the gradient is that of the log odds, log p - log (1 - p).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from linearize.conversion.blocks import recomputing
from linearize.conversion.budget import Choice, Options, candidates, without_memory
from linearize.conversion.calibration import Scores, start_mixer
from linearize.conversion.plan import Plan, plan_for
from linearize.conversion.streaming import asking, started_rows
from linearize.methods.calibration import Calibration
from linearize.methods.layout import Place
from linearize.modeling.attention import LinearizedAttention
from linearize.modeling.mixer import Mixer
from linearize.modeling.modeling_linearized import attentions, mode, observed
from linearize.modeling.spec import MixerSpec, Shape
from linearize.modeling.stream import Inputs
from linearize.progress import Progress
from linearize.ranges import span

MEASURED, MEASURED_ROWS = 8192, 2  # tokens of text and of rows that ask, each, but so many rows at least
TEXT_TOKENS, ASKED_TOKENS = 512, 8  # at the end of a row, whose predictions count


@dataclass(frozen=True)
class Rows:
    """Calibration rows (N, T) in order: text that mixers are fitted to, rows that ask for something, text that is only measured.

    So many rows of text, the last ones, and so many before them that ask are measured; the latter are few, and fitted to as well.
    Of more that ask, they are the first: the tasks come in the order in which they matter.
    """

    ids: Tensor
    text: int
    asked: int

    @classmethod
    def of(cls, ids: Tensor) -> Rows:
        """Of rows of text and, after them, some that ask."""
        count = len(ids) - asking(len(ids))
        text, asked = ids[:count], ids[count:]
        most = max(MEASURED // ids.shape[1], MEASURED_ROWS)
        last = max(min(most, len(text) // 2), 1)
        first = min(most, len(asked))
        return cls(torch.cat([text[:-last], asked[first:], asked[:first], text[-last:]]), last, first)

    @property
    def fitted(self) -> slice:
        return slice(len(self.ids) - self.text)

    @property
    def measured(self) -> slice:
        return slice(self.fitted.stop - self.asked, None)

    def counted(self, measured: int) -> int:
        """How many predictions count at the end of one of the measured rows."""
        return min(ASKED_TOKENS if measured < self.asked else TEXT_TOKENS, self.ids.shape[1] - 1)


@dataclass(frozen=True)
class Weighed:
    """A candidate in one layer, and what it moves: g_t d_t of each token and kv head (N, T, G), in all measured rows."""

    method: str
    options: Options
    mixer: MixerSpec
    moved: Tensor


def measure_costs(model: Any, plan: Plan, rows: Rows, scores: Scores, seed: int, progress: Progress) -> list[Choice]:
    """Every candidate in every layer of a model with the plan's mixers attached, which are not used; and those with slots in pairs,
    one for some kv heads, the other for the rest. Slots go by `scores`, fitted without the rows that are only measured."""
    gradients = output_gradients(model, rows, seed, progress)
    places = [(name, own, plans_of(plan, name, own)) for name, own in candidates(rows.ids.shape[1])]
    found, done = list[Choice](), list[int]()
    specs = {part.mixer for _, _, parts in places for part in parts.values()}
    begin = slice(started_rows(specs, rows.ids.shape[1]))
    ids, measured = torch.cat([rows.ids[rows.fitted][begin], rows.ids[rows.measured]]), slice(-rows.asked - rows.text, None)

    def observe(attention: LinearizedAttention, inputs: Inputs, target: Tensor) -> None:
        layer, every = attention.linearize_index, Calibration(inputs, target)
        fitted, judged = every.part(begin), every.part(measured)
        weighed, near = list[Weighed](), dict[frozenset[tuple[str, Any]], Tensor]()
        for name, own, parts in places:
            slots = frozenset(without_memory(own).items())
            if slots in near:  # what the memory of the same slots left out already
                weighed.append(Weighed(name, own, parts[layer].mixer, near[slots]))
                continue
            mixer = started(parts[layer], plan, fitted, scores.get(layer), seed)
            halves = mixer.halves(judged.inputs)
            off = judged.target, gradients[layer], plan.shape.kv_heads
            weighed.append(Weighed(name, own, mixer.spec, moved(mixer.combine(halves), *off)))
            if mixer.spec.slots and halves.near is not None:
                near[slots] = moved(halves.near.output(), *off)
        found.extend(choices(layer, weighed, plan.shape, rows))
        done.append(layer)
        progress("weigh", len(done), len(plan.parts))

    with torch.random.fork_rng(devices=[]), torch.no_grad(), observed(model, observe), mode(model, "observe"):
        model(ids.to(model.device), logits_to_keep=1)
    return found


def plans_of(plan: Plan, method: str, options: Options) -> Mapping[int, Place]:
    """What each layer of the plan would be under another method."""
    layers = ",".join(map(str, sorted(plan.parts)))
    return plan_for(plan.source, method, layers, options, plan.start).parts


def started(place: Place, plan: Plan, fitted: Calibration, score: Mapping[str, Tensor] | None, seed: int) -> Mixer:
    """A mixer as conversion would start it."""
    torch.manual_seed(seed)
    with torch.device(fitted.target.device):
        mixer = Mixer(place.mixer, plan.shape).eval()
    start_mixer(mixer, place.method, fitted, score)
    return mixer


def moved(output: Tensor, target: Tensor, gradient: Tensor, kv_heads: int) -> Tensor:
    """g_t d_t of each token and kv head (N, T, G), of an output (N, H, T, V) for a target (N, T, H, V)."""
    off = output.transpose(1, 2).to(target.dtype).float() - target.float()
    heads: Tensor = (off * gradient.to(off)).sum(3).unflatten(2, (kv_heads, -1))
    return heads.sum(3)


def cost(moved: Tensor, rows: Rows) -> tuple[float, float]:
    """Of g_t d_t (N, T): KL in nats a token on text, and the same form of the log odds a token that is asked for."""
    squares = moved.square().sum(1) / 2
    asked, text = squares[: rows.asked].mean(), squares[rows.asked :].mean()
    return float(text) / rows.counted(rows.asked), float(asked) / rows.counted(0)


def choices(layer: int, weighed: Sequence[Weighed], shape: Shape, rows: Rows) -> Iterator[Choice]:
    """What a layer may become: each candidate, and of two with slots that fade alike, both with a memory or neither, one in some
    heads, the other in the rest."""
    for one in weighed:
        yield Choice(layer, one.method, one.options, one.mixer.state_bytes(shape), *cost(one.moved.sum(2), rows))
    slotted = sorted((x for x in weighed if x.mixer.slots), key=lambda x: x.mixer.slots)
    for few, many in (pair for pair in combinations(slotted, 2) if len({(x.method, x.mixer.slot_fade) for x in pair}) == 1):
        for heads in gaining(few, many, rows):
            chosen = torch.zeros(shape.kv_heads, dtype=torch.bool, device=few.moved.device)
            chosen[list(heads)] = True
            more = many.mixer.slots - few.mixer.slots
            mixer = replace(few.mixer, more_slots=more, more_heads=heads)
            options = {**few.options, "more_slots": more, "more_heads": span(heads)}
            costs = cost(torch.where(chosen, many.moved, few.moved).sum(2), rows)
            yield Choice(layer, few.method, options, mixer.state_bytes(shape), *costs)


def gaining(few: Weighed, many: Weighed, rows: Rows) -> list[tuple[int, ...]]:
    """Which kv heads take the many slots, for each number of them: those that gain most KL, and those that gain most recall."""
    costs = [[cost(moved, rows) for moved in x.moved.unbind(2)] for x in (few, many)]
    gains = [[a[measure] - b[measure] for a, b in zip(*costs, strict=True)] for measure in (0, 1)]
    orders = [sorted(range(len(own)), key=own.__getitem__, reverse=True) for own in gains]
    found = [tuple(sorted(order[:count])) for order in orders for count in range(1, len(order))]
    return list(dict.fromkeys(found))


def output_gradients(model: Any, rows: Rows, seed: int, progress: Progress) -> dict[int, Tensor]:
    """By layer, the gradients (N, T, H, V) of what counts in measured rows by the attention's output; a row at a time."""
    found: dict[int, list[Tensor]] = {attention.linearize_index: [] for attention in attentions(model)}

    def observe(attention: LinearizedAttention, inputs: Inputs, target: Tensor) -> None:
        own, dtype = found[attention.linearize_index], target.dtype  # a hook that held its tensor would hold the whole graph
        target.register_hook(lambda gradient: own.append(gradient.to(dtype)))

    needed = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    model.enable_input_require_grads()
    draw = torch.Generator().manual_seed(seed)
    try:
        with torch.enable_grad(), observed(model, observe), mode(model, "observe"), recomputing(model):
            for i, row in enumerate(rows.ids[rows.measured]):
                count = rows.counted(i)
                logits = model(row[None].to(model.device), use_cache=False, logits_to_keep=count + 1).logits[0, :-1]
                if i < rows.asked:
                    log_odds(logits.float(), row[-count:].to(logits.device)).sum().backward()
                else:
                    log_probability(logits.float(), drawn(logits, draw)).sum().backward()
                progress("gradients", i + 1, rows.text + rows.asked)
    finally:
        model.disable_input_require_grads()
        for parameter in needed:
            parameter.requires_grad_(True)
    return {layer: torch.cat(own) for layer, own in found.items()}


def drawn(logits: Tensor, draw: torch.Generator) -> Tensor:
    """A token of each distribution."""
    return torch.multinomial(logits.detach().float().softmax(-1).cpu(), 1, generator=draw)[:, 0].to(logits.device)


def log_probability(logits: Tensor, told: Tensor) -> Tensor:
    """log p of tokens (n,) under logits (n, vocabulary)."""
    return -torch.nn.functional.cross_entropy(logits, told, reduction="none")


def log_odds(logits: Tensor, told: Tensor) -> Tensor:
    """log p - log (1 - p): the logit, less the logsumexp of all others."""
    own = logits.gather(1, told[:, None])[:, 0]
    return own - logits.scatter(1, told[:, None], -torch.inf).logsumexp(-1)
