"""What the benchmark of distillation makes of its times, with a clock that the models move; and that it trains what it says."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from flow.clock import clock_of, moves, tokens_of

from linearize.benchmarks.distill import KINDS, PROFILE, RATIO, lengths_apart, stages
from linearize.benchmarks.operators import GROUPS, OTHER, group_of, shares
from linearize.benchmarks.subject import Subject
from linearize.benchmarks.training import attention_step, stage_of, with_adapter
from linearize.errors import InputError


def by_mode(module: Any, given: dict[str, Any]) -> float:
    return {"student": 2.0, "teacher": 1.0, "observe": 4.0}[module.linearize_mode]


def test_stages(subject: Subject) -> None:
    """Observed passes take 4 s, the student's 2 s, stock ones 1 s: LoRA has one of the first two each, or two stock ones."""
    clock = clock_of(subject)
    moves(clock, subject.model, by_mode)
    moves(clock, subject.teacher, lambda module, given: 1.0)
    rows, found = stages(subject, [32, 16], KINDS, (RATIO, PROFILE), 2)
    seconds = {(r["name"], r["length"]): r["seconds"]["median"] for r in rows}
    for length in (16, 32):
        assert seconds["attention", length] == seconds["attention, packed", length] == 4.0
        assert seconds["teacher forward", length] == 1.0
        assert seconds["lora", length] == 6.0
        assert seconds["lora, unconverted", length] == 2.0
    assert [r["throughput"] for r in found["ratios"] if r["stage"] == "attention"] == [
        {"attention": 0.25, "attention, packed": 0.25}
    ] * 2
    assert [r["throughput"]["lora"] for r in found["ratios"] if r["stage"] == "lora"] == pytest.approx([2 / 6] * 2)
    assert set(found["profiles"]) == {"attention", "lora"}
    assert not any("lora_" in name for model in (subject.model, subject.teacher) for name, _ in model.named_parameters())


def test_steps_train_what_distill_would_and_move_nothing(subject: Subject) -> None:
    before = {name: p.clone() for name, p in subject.model.named_parameters()}
    step = attention_step(subject.model, subject.text(24))
    step()
    grads = {name for name, p in subject.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert grads
    assert all(".linearize." in name for name in grads)
    assert all(torch.equal(p, before[name]) for name, p in subject.model.named_parameters())
    stage = stage_of(subject.model, "lora")
    assert stage is not None
    assert stage.loss == "kl"
    sizes = [sum(p.numel() for name, p in with_adapter(m, stage)[0].named_parameters() if "lora_" in name) for m in both(subject)]
    assert sizes[0] == sizes[1] > 0


def both(subject: Subject) -> tuple[Any, Any]:
    return subject.model, subject.teacher


def test_time_a_token_by_length(subject: Subject) -> None:
    """A pass of T tokens takes T ms, and T^2 / 10 ms for the teacher, which stops at its own length."""
    clock = clock_of(subject)
    moves(clock, subject.model, lambda _, given: 1e-3 * tokens_of(given))
    moves(clock, subject.teacher, lambda _, given: 1e-4 * tokens_of(given) ** 2)
    heads = [subject.model.lm_head, subject.teacher.lm_head]
    logits: list[int] = []
    for head in heads:
        head.register_forward_hook(lambda _, given, out: logits.append(out.shape[1]))
    rows, found = lengths_apart(subject, [16, 32, 64], 32, 1)
    assert [r["seconds"]["runs"] for r in rows] == [2, 1, 1, 1, 1]  # short rows more often
    assert found["student"]["seconds_a_token"] == pytest.approx({"16": 1e-3, "32": 1e-3, "64": 1e-3})
    assert found["student"]["largest_over_smallest"] == pytest.approx(1)
    assert found["teacher"]["seconds_a_token"] == pytest.approx({"16": 1.6e-3, "32": 3.2e-3})
    assert found["teacher"]["largest_over_smallest"] == pytest.approx(2)
    work = {(r["name"].split(",")[0], r["length"]): r["work"]["flops"] for r in rows}
    assert work["student", 64] == pytest.approx(2 * work["student", 32], rel=0.25)
    assert set(logits) == {1}


def test_stage_lora_alone(subject: Subject) -> None:
    """The stock model is made of the student before an adapter is put on it."""
    ticks = itertools.count()
    subject.clock = lambda: float(next(ticks))
    rows, found = stages(subject, [16], ("lora",), (RATIO,), 1)
    assert [row["name"] for row in rows] == ["lora", "lora, unconverted"]
    assert [ratio["stage"] for ratio in found["ratios"]] == ["lora"]


def test_a_method_without_a_stage_is_told(subject: Subject) -> None:
    subject.model.config.linearize["method"] = "window"
    with pytest.raises(InputError, match="no stage attention"):
        attention_step(subject.model, subject.text(8))


# ---- operators ----


@pytest.mark.parametrize(
    ("operator", "group"),
    [
        ("aten::addmm", "matrix products"), ("aten::bmm", "matrix products"), ("aten::mkldnn_linear_backward", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "softmax attention"),
        ("aten::exp", "softmax and exp"), ("aten::_softmax_backward_data", "softmax and exp"),
        ("aten::expand", "views and allocation"), ("aten::copy_", "copies"), ("aten::_to_copy", "copies"),
        ("aten::slice_backward", "views and allocation"), ("aten::logical_and", "elementwise"), ("aten::add_", "elementwise"),
        ("aten::sum", "sums and maxima"), ("aten::t", "views and allocation"), ("aten::tri_inverse", OTHER),
    ],
)  # fmt: skip
def test_operators_have_groups(operator: str, group: str) -> None:
    assert group_of(operator) == group
    assert group in (*GROUPS, OTHER)


def test_shares_are_of_the_whole_and_the_longest_come_first() -> None:
    operators = [{"name": f"aten::op{i}", "calls": 1, "seconds": float(i)} for i in range(20)]
    found = shares({"a": 1.0, "b": 3.0, "c": 0.0}, operators, 10.0)
    assert [(g["group"], g["share"]) for g in found["groups"]] == [("b", 0.3), ("a", 0.1)]
    assert [o["share"] for o in found["operators"][:2]] == [1.9, 1.8]
    assert len(found["operators"]) == 12
