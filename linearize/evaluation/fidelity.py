"""One evaluation: teacher, student, its halves switched off, and the window that its state would buy, on the same tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from linearize import text
from linearize.evaluation.perplexity import Variant, compare
from linearize.evaluation.recall import retrieval
from linearize.methods.calibration import relative_error
from linearize.modeling.attention import LinearizedAttention
from linearize.modeling.mixer import Inputs
from linearize.modeling.modeling_linearized import ablated, attentions, mode, observed, replaced
from linearize.modeling.spec import MixerSpec, Shape
from linearize.progress import Progress, silent

BASELINE_WINDOW, BASELINE_SINKS = 64, 4
LENGTH = 1024
RECALL_LENGTHS, RECALL_SAMPLES = (256, 512, 1024), 4


@dataclass(frozen=True)
class Evaluation:
    """The fidelity table and what explains it."""

    model: str
    method: str
    text: str
    tokens: int
    rows: list[dict[str, Any]]
    layers: list[dict[str, Any]] = field(default_factory=list)
    recall: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def row(self, name: str) -> dict[str, Any]:
        return next(row for row in self.rows if row["name"] == name)


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
        merge="near", feature_map="identity", share_kv=True,
    )  # fmt: skip


def window_for(spec: MixerSpec, shape: Shape, budget: int) -> int:
    """The sliding window whose state takes `budget` bytes a layer, for the sinks of `spec`."""
    token = window_alone(spec, 2).state_bytes(shape) - window_alone(spec, 1).state_bytes(shape)
    fixed = window_alone(spec, 1).state_bytes(shape) - token
    return max((budget - fixed) // token, 1)


def variants_of(model: Any, host: Any) -> list[Variant]:
    """Teacher first (where there is one), then the student, its halves, and the windows alone."""
    mixers = [attention.linearize for attention in attentions(model)]
    shape, layers = mixers[0].shape, len(mixers)
    spec = next((m.spec for m in mixers if m.spec.has_near), mixers[0].spec)  # in a hybrid, of a layer with a window
    total = sum(m.spec.state_bytes(shape) for m in mixers)
    found = [Variant("teacher", host, lambda: mode(host, "teacher"))] if host is not None else []
    found.append(Variant("student", model, state_bytes=total))
    if spec.has_near and any(m.spec.has_far for m in mixers):
        found.append(Variant("student, far memory off", model, lambda: ablated(model, "far")))
        found.append(Variant("student, window off", model, lambda: ablated(model, "near")))
    if any(m.spec.slots for m in mixers):
        found.append(Variant("student, slots off", model, lambda: ablated(model, "slots")))
    if host is not None:
        for window in sorted({window_alone(spec).window, window_for(spec, shape, total // layers)}):
            alone = window_alone(spec, 0 if window == window_alone(spec).window else window)
            name = f"window {alone.window} + {alone.sinks} sinks alone"
            context = (lambda bare: lambda: replaced(host, bare))(alone)
            own = host is model and spec.has_far and all(m.spec.near_only() == alone and not m.spec.slots for m in mixers)
            same_as = "student, far memory off" if own else None  # the weights are the teacher's until a merge
            found.append(Variant(name, host, context, layers * alone.state_bytes(shape), same_as))
    return found


def evaluate_model(
    model: Any, host: Any, tokenizer: Any, rows: text.Packed, name: str, source: str, *,
    recall: bool = True, seed: int = 0, notes: list[str] | None = None, progress: Progress = silent,
) -> Evaluation:  # fmt: skip
    """The table for a model in memory; `host` plays the teacher (see `teacher_host`) or is None."""
    variants = variants_of(model, host)
    sums = compare(variants, rows, lambda done, total: progress("evaluate", done, total))
    first = sums[0].perplexity if host is not None else None
    table = [
        {
            "name": v.name,
            "perplexity": s.perplexity,
            "ratio": s.perplexity / first if first else None,
            "top1": s.agree / s.tokens if first else None,
            "kl": s.divergence / s.tokens if first else None,
            "state_bytes": v.state_bytes,
        }
        for v, s in zip(variants, sums, strict=True)
    ]
    found = []
    if recall:
        names = {"teacher": "teacher", "student": "student"}
        chosen = {names[v.name]: v for v in variants if v.name in names}
        alone = next((v for v in variants if v.name.endswith("alone")), None)
        chosen |= {"near_only": alone} if alone is not None else {}
        found = retrieval(
            chosen, tokenizer, RECALL_LENGTHS, RECALL_SAMPLES, seed, lambda done, total: progress("recall", done, total)
        )
    layers = layer_errors(model, host, rows) if host is model else []
    return Evaluation(
        name, model.config.linearize["method"], source, sums[0].tokens, table, layers, found, [*(notes or []), *remarks(table)]
    )


def layer_errors(model: Any, host: nn.Module, rows: text.Packed) -> list[dict[str, Any]]:
    """Each layer's relative output error on the teacher's own inputs, over one row."""
    found: list[dict[str, Any]] = []

    def observe(attention: LinearizedAttention, inputs: Inputs, target: Tensor) -> None:
        output, _ = attention.linearize(inputs)
        found.append({"index": attention.linearize_index, "relative_error": float(relative_error(output, target).mean())})

    with torch.no_grad(), observed(host, observe), mode(host, "observe"):
        host(rows.ids[:1].to(model.device), position_ids=rows.positions[:1].to(model.device), logits_to_keep=1)
    return found


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
