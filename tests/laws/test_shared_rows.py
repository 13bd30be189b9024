"""Sequence parallel training: processes that share a row give the losses and gradients that one process gives for it."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import together
from torch import Tensor, nn
from torch import distributed as dist

from linearize import convert_model
from linearize.distillation import lora
from linearize.distillation.sequence_parallel import OVER_PARTS, Reading, alone, check_sharing, sharing, softmax_configs
from linearize.distillation.sequence_softmax import Reach, attention
from linearize.distillation.stages import AttentionTransfer, LogitDistillation, lora_parameters, mixer_parameters
from linearize.errors import LinearizeError, UnsupportedError, UsageError
from linearize.methods.base import Stage
from linearize.modeling.attention import softmax_attention
from linearize.modeling.modeling_linearized import attentions, mode
from linearize.modeling.rows import segment_ids
from linearize.modeling.window import Scores
from linearize.testing.families import tiny_family
from linearize.testing.laws import deviation
from linearize.testing.models import random_inputs, randomise, tiny_shape

EXACT, LENGTH = 1e-9, 64
ATTENTION = Stage("attention", 1, 1e-2, loss="relative_mse + mse + 0.1*mass", far_weight=3.0, window_min=2, window_dropout=0.2)
WEIGHTS = Stage("attention", 1, 1e-2, loss="weights + relative_mse")
LORA = Stage("lora", 1, 1e-2, loss="kl + 0.5*ce + hidden", mixer_lr=1e-2, rank=2, far_weight=3.0, window_min=2)
LONG = Stage("long", 1, 1e-2, loss="ce", mixer_lr=1e-2, rank=2)


@dataclass(frozen=True)
class Case:
    """A converted family and a stage; `kept` layers stay softmax."""

    family: str
    method: str
    stage: Stage
    layers: str = "all"
    kept: int = 0
    window: int = 4

    @property
    def name(self) -> str:
        return f"{self.family} {self.method} {self.stage.kind}"


CASES = [
    Case("llama", "default", ATTENTION),
    Case("llama", "hedgehog", WEIGHTS, window=0),
    Case("llama", "default", LORA),
    Case("gemma2", "default", replace(ATTENTION, loss="relative_mse")),  # softcap, layers that slide
    Case("gemma2", "default", LORA),
    Case("olmo3", "lolcats", LORA, "1", kept=2),  # these slide and stay softmax
    Case("qwen3", "gated-deltanet,softmax", LONG, kept=1, window=0),
    Case("gpt2", "lawcat", LORA, window=0),  # learned positions, a convolution
    Case("opt", "liger", LORA),
    Case("phi", "mom", LONG, window=0),
]


class Loop:
    """What a stage asks of accelerate."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group

    def reduce(self, x: Tensor, _: str) -> Tensor:
        if self.group is None:
            return x
        x = x.clone()
        dist.all_reduce(x, group=self.group)
        return x / self.group.size()

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def converted(case: Case) -> Any:
    options = {"window": case.window, "sinks": 2} if case.window else {}
    model = convert_model(tiny_family(case.family), method=case.method, layers=case.layers, options=options).double()
    for module in attentions(model):
        randomise(module.linearize)
    assert model.config.linearize["softmax_layers"] == case.kept
    return model


def rows(length: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Documents that begin inside parts, at their edges and not at all."""
    ids = torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(1))
    begins = torch.zeros(batch, length, dtype=torch.long)
    for row, places in enumerate([(length // 8, length // 2, length // 2 + 1), (length - 3,)][:batch]):
        begins[row, list(places)] = 1
    at = torch.arange(length).expand(batch, -1)
    return ids, at - (at * begins).cummax(1).values


def gradients(case: Case, ids: Tensor, positions: Tensor, reading: Reading, group: dist.ProcessGroup | None) -> dict[str, Any]:
    """What one step gives: the loss, each layer's, and all gradients, as the loop would have them."""
    model: Any = converted(case).requires_grad_(False)
    if case.stage.kind != "attention":
        model = lora.add_adapter(model, case.stage, 0)
    for number, parameter in enumerate(lora_parameters(model).values()):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)).double() / 4
    trained: dict[str, nn.Parameter] = mixer_parameters(model) | lora_parameters(model)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    loop: Any = Loop(group)
    transfer = case.stage.kind == "attention"
    task: Any = (
        AttentionTransfer(model, case.stage, reading)
        if transfer
        else LogitDistillation(loop, model, model, case.stage, None, reading)
    )
    torch.manual_seed(7)
    loss = task.backward(ids, positions)
    found = {"loss": loop.reduce(torch.tensor(loss, dtype=torch.float64), "mean")}
    found |= {f"loss of layer {i}": torch.tensor(x, dtype=torch.float64) for i, x in task.by_layer.items()}
    for name, parameter in trained.items():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found[name] = loop.reduce(grad, "mean")
    assert not any("forward" in vars(m.linearize) or "linearize_softmax" in vars(m) for m in attentions(model))
    assert all(config._attn_implementation_internal != OVER_PARTS for config in softmax_configs(model))
    return found


def every_case(cases: list[Case], length: int, batch: int) -> dict[str, dict[str, float]]:
    """How far the processes' mean is from one process with the whole rows."""
    group, (ids, positions) = dist.group.WORLD, rows(length, batch)
    assert group is not None
    found = {}
    for case in cases:
        mine = gradients(case, ids, positions, partial(sharing, group), group)
        whole = gradients(case, ids, positions, alone, None)
        assert mine.keys() == whole.keys()
        assert sum(bool(x.any()) for x in whole.values()) > len(whole) // 2, case.name
        found[case.name] = {name: deviation(mine[name], whole[name]) for name in mine if bool(whole[name].any())}
    return found


def check(found: list[dict[str, dict[str, float]]], cases: list[Case]) -> None:
    wrong = []
    for rank, errors in enumerate(found):
        assert len(errors) == len(cases)
        for name, own in errors.items():
            wrong += [f"{name}, process {rank}, {what}: {e:.1e}" for what, e in own.items() if not e <= EXACT]
    assert not wrong, "\n".join(wrong[:40])


def test_two_processes_are_one(tmp_path: Path) -> None:
    check(together(2, tmp_path, every_case, CASES, LENGTH, 2), CASES)


@pytest.mark.exhaustive
def test_four_processes_are_one(tmp_path: Path) -> None:
    check(together(4, tmp_path, every_case, CASES, LENGTH, 2), CASES)


LONG_CASES = [
    Case("llama", "default", replace(ATTENTION, loss="relative_mse + mass"), window=64),
    Case("llama", "default", replace(LORA, window_min=0), "0,2", kept=1, window=64),
]


@pytest.mark.exhaustive
def test_16k_tokens_in_four_processes(tmp_path: Path) -> None:
    check(together(4, tmp_path, every_case, LONG_CASES, 16_384, 1), LONG_CASES)


SCORES = {
    "plain": Scores(0.4), "sliding": Scores(0.4, sliding=7), "softcap": Scores(0.4, softcap=3.0),
    "sinks": Scores(0.4, null=torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)),
}  # fmt: skip


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("length", [23, 700])
def test_softmax_over_the_whole_row(score: Scores, length: int) -> None:
    """A part's queries against the original attention of all, with documents; and the same gradients."""
    inputs = replace(random_inputs(tiny_shape(), length), score=score)
    _, positions = rows(length)
    inputs = replace(inputs, segments=segment_ids(length, None, positions, positions.device))
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    whole, start = softmax_attention(inputs), length // 3
    at = torch.arange(start, length)
    reach = Reach(start, at - positions[:, start:])
    mine = attention(inputs.q[:, :, start:], inputs.k, inputs.v, score, reach)
    assert deviation(mine.detach(), whole[:, start:].detach()) < EXACT
    weight = torch.randn_like(mine)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), leaves) for x in (mine, whole[:, start:])), strict=True):
        assert deviation(a, b) < EXACT


def test_the_teacher_is_the_original(tmp_path: Path) -> None:
    """The logits of both processes' parts, laid together, are those of transformers' own model."""
    for errors in together(2, tmp_path, teachers):
        assert max(errors.values()) < 1e-5, errors


def teachers() -> dict[str, float]:
    """With layers that stay softmax, softcap and learned sinks; gpt-oss' own layers do not tell documents apart."""
    found, group = {}, dist.group.WORLD
    assert group is not None
    for case in (CASES[0], Case("gemma2", "default", LORA, "1", kept=2), Case("gpt_oss", "lolcats", LORA, "1", kept=2)):
        ids, positions = rows(LENGTH)
        if case.family == "gpt_oss":
            positions = torch.arange(LENGTH).expand_as(positions)
        model = converted(case).float()
        with torch.no_grad():
            with mode(model, "teacher"):
                expected = model(ids, position_ids=positions, use_cache=False).logits
            with sharing(group, model, positions) as own, mode(model, "observe"):
                mine = model(own.cut(ids), position_ids=own.cut(positions), use_cache=False).logits
        found[case.name] = deviation(mine, own.cut(expected))
    return found


REFUSED: list[tuple[dict[str, Any], int, int, type[LinearizeError], str]] = [
    ({}, 1, 64, UsageError, "one process has nobody"),
    ({}, 3, 64, UsageError, "rows of 64 tokens do not split into 3 equal parts: --sequence-parallel, stage attention"),
    ({}, 32, 64, UsageError, "parts of 2 tokens are shorter than the 4 that a window reaches back"),
    ({"slots": 4, "slot_score": "recall"}, 2, 64, UnsupportedError, "layer 0 cannot be split over processes: .*reads the memory"),
    ({"slots": 4, "slot_score": "norm"}, 2, 64, UnsupportedError, "given away in order"),
]


@pytest.mark.parametrize("options, processes, length, kind, what", REFUSED, ids=[what for *_, what in REFUSED])
def test_what_is_refused(options: dict[str, Any], processes: int, length: int, kind: type[LinearizeError], what: str) -> None:
    model = convert_model(tiny_family("llama"), method="default", options={"window": 4, **options})
    with pytest.raises(kind, match=what) as refused:
        check_sharing(model, processes, {"attention": length})
    assert refused.value.fix
    check_sharing(convert_model(tiny_family("llama"), method="default", options={"window": 4}), 2, {"attention": 64})


def test_rope_that_depends_on_the_length_is_refused() -> None:
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = convert_model(tiny_family("llama", rope_parameters=scaled), method="default", options={"window": 4})
    with pytest.raises(UnsupportedError, match="RoPE of type 'dynamic' depends on how long a whole row is"):
        check_sharing(model, 2, {"lora": 64})


def test_nothing_keeps_the_group_when_rows_are_shared_no_more() -> None:
    """A group that lives to the end of the interpreter has threads then, and they abort it."""
    group: Any = type("Group", (), {})()
    kept, model = weakref.ref(group), convert_model(tiny_family("llama"), method="default", layers="1")
    with sharing(group, model, torch.zeros(1, 4, dtype=torch.long)):
        pass
    del group
    assert kept() is None


def test_what_the_original_attention_keeps_for_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grows with the row, not with its square, whoever makes the products."""
    monkeypatch.setattr("linearize.modeling.attention.by_onednn", lambda x: True)

    def kept(length: int) -> int:
        inputs, sizes = replace(random_inputs(tiny_shape(), length), score=SCORES["plain"]), dict[int, int]()

        def note(x: torch.Tensor) -> torch.Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        for x in (inputs.q, inputs.k, inputs.v):
            x.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            out = softmax_attention(inputs)
        assert out.requires_grad
        return sum(sizes.values())

    assert kept(2048) < 2.1 * kept(1024)
