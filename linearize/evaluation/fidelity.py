"""One evaluation: teacher, student, its halves switched off, and the window that its state would buy, on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from linearize import text
from linearize.evaluation.environment import environment
from linearize.evaluation.intervals import draws
from linearize.evaluation.layers import layer_errors
from linearize.evaluation.perplexity import LOSS, POSITION_BLOCK, TOKENS, Sums, compare, figures
from linearize.evaluation.reading import Variant
from linearize.evaluation.recall import Grid, by_length, retrieval
from linearize.evaluation.samples import side_by_side
from linearize.evaluation.speed import speed
from linearize.evaluation.texts import Texts
from linearize.modeling.modeling_linearized import ablated, attentions, mode, replaced
from linearize.modeling.spec import MixerSpec, Shape
from linearize.progress import Progress, silent

BASELINE_WINDOW, BASELINE_SINKS = 64, 4
LENGTH = 1024
FEW = 8  # documents


@dataclass(frozen=True)
class Evaluation:
    """The fidelity table and what explains it; what was not measured is empty."""

    model: str
    method: str
    text: str
    tokens: int
    rows: list[dict[str, Any]]
    layers: list[dict[str, Any]] = field(default_factory=list)
    positions: list[dict[str, Any]] = field(default_factory=list)
    recall: list[dict[str, Any]] = field(default_factory=list)
    recall_by_length: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    speed: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, Any] = field(default_factory=dict)
    documents: int = 0
    text_hash: str = ""  # of the tokens that were read: rows of two evaluations are alike where it is the same
    environment: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def row(self, name: str) -> dict[str, Any]:
        return next(row for row in self.rows if row["name"] == name)


@dataclass(frozen=True)
class Parts:
    """What an evaluation measures beside the table: recall, continuations, speed at these lengths."""

    recall: Grid | None = None
    samples: bool = False
    speed: tuple[int, ...] = ()
    seed: int = 0


def held_out_rows(tokenizer: Any, docs: list[str], tokens: int, length: int = LENGTH) -> text.Packed:
    """At most `tokens` tokens in rows that each lie inside one document where documents are long enough."""
    encoded = text.tokenise(tokenizer, docs, limit=tokens * 4)
    rows = text.whole(encoded, min(length, max(sum(map(len, encoded)), 2)))
    count = max(tokens // rows.ids.shape[1], 1)
    step = max(len(rows) // count, 1)
    return text.Packed(rows.ids[::step][:count], rows.positions[::step][:count])


def window_alone(spec: MixerSpec, window: int = 0) -> MixerSpec:
    """The exact window and sinks that a method must beat: its own, or 64 + 4 where it has none."""
    own = spec if spec.has_near else MixerSpec(window=BASELINE_WINDOW)
    sinks = max(own.sinks, BASELINE_SINKS)
    return MixerSpec(
        window=window or own.window, window_kind="sliding" if window else own.window_kind, sinks=sinks,
        merge="near", feature_map="identity", share_kv=True, kv_dtype=own.kv_dtype,
    )  # fmt: skip


def state_of(specs: Sequence[MixerSpec], shapes: Sequence[Shape], item: int) -> int:
    """Bytes of one sequence's state over all converted layers, for activations of `item` bytes."""
    return sum(spec.state_bytes(shape, item) for spec, shape in zip(specs, shapes, strict=True))


def window_for(spec: MixerSpec, shapes: Sequence[Shape], budget: int, item: int) -> int:
    """The sliding window, the same in all layers, whose states take `budget` bytes together, for the sinks of `spec`."""
    one, two = (state_of([window_alone(spec, n)] * len(shapes), shapes, item) for n in (1, 2))
    return max((budget - one) // (two - one) + 1, 1)


def teacher_of(host: Any) -> Variant:
    """The host with its mixers off."""
    return Variant("teacher", host, lambda: mode(host, "teacher"))


def variants_of(model: Any, host: Any) -> list[Variant]:
    """Teacher first (where there is one), then the student, its halves, and the windows alone.

    Bytes of keys and values that are kept exact are those of the model's dtype, or of what the student stores them in.
    """
    mixers = [attention.linearize for attention in attentions(model)]
    specs, shapes, item = [m.spec for m in mixers], [m.shape for m in mixers], model.dtype.itemsize
    spec = next((s for s in specs if s.has_near), specs[0])  # in a hybrid, of a layer with a window
    total = state_of(specs, shapes, item)
    found = [teacher_of(host)] if host is not None else []
    found.append(Variant("student", model, state_bytes=total))
    if spec.has_near and any(s.has_far for s in specs):
        found.append(Variant("student, far memory off", model, lambda: ablated(model, "far")))
        found.append(Variant("student, window off", model, lambda: ablated(model, "near")))
    if any(s.slots for s in specs):
        found.append(Variant("student, slots off", model, lambda: ablated(model, "slots")))
    if host is not None:
        for window in sorted({window_alone(spec).window, window_for(spec, shapes, total, item)}):
            alone = window_alone(spec, 0 if window == window_alone(spec).window else window)
            name = f"window {alone.window} + {alone.sinks} sinks alone"
            context = (lambda bare: lambda: replaced(host, bare))(alone)
            own = host is model and spec.has_far and all(s.near_only() == alone and not s.slots for s in specs)
            same_as = "student, far memory off" if own else None  # the weights are the teacher's until a merge
            found.append(Variant(name, host, context, state_of([alone] * len(shapes), shapes, item), same_as))
    return found


def evaluate_model(
    model: Any, host: Any, tokenizer: Any, texts: Texts, name: str, source: str, *,
    parts: Parts | None = None, docs: Sequence[str] = (), notes: Sequence[str] = (), progress: Progress = silent,
) -> Evaluation:  # fmt: skip
    """The table for a model in memory; `host` plays the teacher (see `teacher_host`) or is None. `docs` surround what is hidden."""
    parts, taught = parts or Parts(), host is not None
    variants = variants_of(model, host)
    sums = compare(variants, texts.rows, partial(progress, "evaluate"))
    table, positions = tabulate(variants, sums, texts, taught, parts.seed)
    chosen = {v.name: v for v in variants if v.name in ("teacher", "student")}
    window = max((a.linearize.spec.window for a in attentions(model)), default=0) or BASELINE_WINDOW
    recall, said, measured = [], list[dict[str, Any]](), dict[str, Any]()
    if parts.recall is not None:
        asked = {v.name: v for v in recalling(variants)}
        recall = retrieval(asked, tokenizer, docs, parts.recall, window, partial(progress, "recall"))
    if parts.samples:
        said, rates = side_by_side(list(chosen.values()), tokenizer, texts, partial(progress, "continue"))
        table = [{**row, "repetition": rates.get(row["name"])} for row in table]
    if parts.speed:
        measured = speed(chosen, parts.speed, model.config.vocab_size, partial(progress, "speed"))
    teacher = variants[0].context if taught else None
    longest = max(texts.rows, key=lambda row: row.ids.shape[1])
    layers = layer_errors(model, host, teacher, longest)
    return Evaluation(
        name, model.config.linearize["method"], source, sums[0].tokens, table, layers, positions, recall,
        by_length(recall), said, measured, documents=len(set(texts.documents)), text_hash=texts.hash(),
        environment=environment(model, parts.seed),
        notes=[*notes, *few(texts), *remarks(table)],
    )  # fmt: skip


def recalling(variants: Sequence[Variant]) -> list[Variant]:
    """Those whose recall is asked for: teacher, student, without far memory, without slots, the window of the same bytes."""
    names = ("teacher", "student", "student, far memory off", "student, slots off")
    return [v for v in variants if v.name in names] + [v for v in variants if v.name.endswith("alone")][-1:]


def tabulate(
    variants: Sequence[Variant], sums: Sequence[Sums], texts: Texts, taught: bool, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The table's rows over all tokens, and each variant's figures by range of positions, with a finer curve to draw."""
    weights = draws(texts.documents, seed)
    everything = [s.between(0, texts.longest) for s in sums]
    table = [
        {"name": v.name, **figures(cells, everything[0] if taught else None, weights), "state_bytes": v.state_bytes}
        for v, cells in zip(variants, everything, strict=True)
    ]
    positions = []
    for v, s in zip(variants, sums, strict=True):
        buckets = []
        for first, last in texts.buckets():
            cells, teacher = s.between(first, last), sums[0].between(first, last) if taught else None
            used = {d for d, row in zip(texts.documents, cells, strict=True) if row[TOKENS] > 0}
            where = {"from": first, "to": last, "documents": len(used), "tokens": int(cells[:, TOKENS].sum())}
            buckets.append({**where, **figures(cells, teacher, weights)})
        positions.append({"name": v.name, "buckets": buckets, "curve": curve(s, texts.longest)})
    return table, positions


def curve(sums: Sums, longest: int) -> list[tuple[int, float]]:
    """Nats a token by position: the last of each bin of 256, and its mean loss."""
    ends = range(POSITION_BLOCK, longest + POSITION_BLOCK, POSITION_BLOCK)
    bins = ((end, sums.between(end - POSITION_BLOCK, end).sum(0)) for end in ends)
    return [(end, float(cells[LOSS] / cells[TOKENS])) for end, cells in bins if cells[TOKENS] > 0]


def few(texts: Texts) -> list[str]:
    """A warning where intervals over documents cannot say much."""
    count = len(set(texts.documents))
    return [] if count >= FEW else [f"{count} documents only: what others would give may lie outside the intervals"]


def remarks(table: list[dict[str, Any]]) -> list[str]:
    """What the table means, in plain words, the bad news too."""
    student = next(row for row in table if row["name"] == "student")
    found = []
    for row in table:
        if row["name"].endswith("alone"):
            better = student["perplexity"] < row["perplexity"]
            verdict = "is better than" if better else "does NOT beat"
            found.append(f"the student ({student['perplexity']:.2f}) {verdict} {row['name']} ({row['perplexity']:.2f})")
    return found
