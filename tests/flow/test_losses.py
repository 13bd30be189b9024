"""The losses against their definitions, and the stages that use them: a drawn window is that window, weights weigh."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from linearize import convert_model
from linearize.distillation.layer_losses import LAYER_LOSSES, LayerCall
from linearize.distillation.logit_losses import LOGIT_LOSSES, LogitCall
from linearize.distillation.losses import check_losses, terms
from linearize.distillation.stages import AttentionTransfer, drawn_window, narrowed, token_weight
from linearize.errors import UsageError
from linearize.methods import make
from linearize.methods.base import Stage
from linearize.methods.calibration import Calibration
from linearize.modeling.mixer import Mixer
from linearize.modeling.modeling_linearized import attentions, mode, observed
from linearize.modeling.spec import Shape
from linearize.modeling.stream import Inputs
from linearize.modeling.window import Scores
from linearize.testing.families import tiny_family
from linearize.testing.models import random_inputs, random_mixer, randomise, tiny_shape

TIME, WINDOW, SINKS = 40, 6, 2
STAGE = Stage("attention", 1000, 1e-2)
SHAPE = Shape(heads=4, kv_heads=2, head_dim=8, value_dim=8, hidden_size=32)


def mixer_and_inputs(packed: bool, score: Scores | None = None, **axes: Any) -> tuple[Mixer, Inputs, Tensor]:
    """A random mixer with a window, random inputs of two rows, and the output of the softmax over all."""
    torch.manual_seed(0)
    spec = replace(make("default").point(), window=WINDOW, sinks=SINKS, far_rope=True, **axes)
    mixer = Mixer(spec, SHAPE).double()
    randomise(mixer)
    q, k, v = (torch.randn(2, heads, TIME, 8, dtype=torch.float64) for heads in (4, 2, 2))
    segments = torch.stack([torch.arange(TIME) >= cut for cut in (13, 25)]).long() if packed else None
    inputs = Inputs(q, k, v, None, score or Scores(0.5), segments=segments)
    return mixer, inputs, teacher_weights(inputs) @ v.repeat_interleave(2, 1)


def teacher_weights(inputs: Inputs) -> Tensor:
    """Attention (B, H, T, T), plainly."""
    scores = inputs.score(inputs.q, inputs.k.repeat_interleave(2, 1))
    seen = torch.ones(TIME, TIME).tril().bool()[None]
    if inputs.segments is not None:
        seen = seen & (inputs.segments[:, :, None] == inputs.segments[:, None])
    if inputs.score.sliding is not None:
        seen = seen & torch.ones(TIME, TIME).triu(1 - inputs.score.sliding).bool()
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    if inputs.score.null is not None:
        null = inputs.score.null[:, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, null.to(scores.dtype)], -1).softmax(-1)[..., :-1]
    return scores.softmax(-1)


def position(inputs: Inputs) -> Tensor:
    """Of each token in its document (B, T)."""
    if inputs.segments is None:
        return torch.arange(TIME).expand(2, -1)
    starts = torch.stack([(row == row[:, None]).int().argmax(1) for row in inputs.segments])
    return torch.arange(TIME) - starts


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 2.0}, {"null": torch.tensor([0.3, -1, 2, 0])}], ids=["plain", "softcap", "null"]
)
def test_mass_is_the_divergence_of_near_and_far_shares(packed: bool, options: dict[str, Any]) -> None:
    """Against the shares that the mixer's own output shows for values of 1 at near tokens and 0 at far ones."""
    mixer, inputs, _ = mixer_and_inputs(packed, Scores(0.5, **options))
    places = position(inputs)
    weights = teacher_weights(inputs)
    expected = []
    for row in range(2):
        for t in range(TIME):
            own = [j for j in range(t + 1) if places[row, j] == places[row, t] - (t - j)]
            far = [j for j in own if places[row, j] >= SINKS and t - j >= WINDOW]
            if not far:
                expected += [0.0] * 4
                continue
            share = weights[row, :, t, far].sum(-1)
            its = far_share(mixer, inputs, row, t, far)
            gap = share * (share / its).log() + (1 - share) * ((1 - share) / (1 - its)).log()
            expected += gap.tolist()
    found = LAYER_LOSSES["mass"](LayerCall(mixer, inputs, torch.zeros(2, TIME, 4, 8)))
    assert float(found.detach()) == pytest.approx(math.fsum(expected) / len(expected), rel=1e-9)
    assert float(found.detach()) > 1e-3
    found.backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in mixer.far_mass.parameters())


@torch.no_grad()
def far_share(mixer: Mixer, inputs: Inputs, row: int, t: int, far: list[int]) -> Tensor:
    """The student's own weight on far tokens (H,): its output where values are 1 at those and 0 elsewhere."""
    ones = torch.zeros_like(inputs.v)
    ones[row, :, far] = 1.0
    out, _ = mixer(replace(inputs, v=ones))
    return out[row, t, :, 0]


def test_mass_is_refused_where_there_is_none() -> None:
    mixers = {name: make(name).point().to_dict() for name in ("default", "hedgehog")}
    layers = [{"module": name, "mixer": mixer} for name, mixer in mixers.items()]
    stage = replace(STAGE, loss="relative_mse + 0.1*mass")
    check_losses([stage], layers[:1])
    with pytest.raises(UsageError, match="hedgehog"):
        check_losses([stage], layers)


def test_a_loss_is_read() -> None:
    assert terms(replace(STAGE, loss="relative_mse + 0.1*mass")) == {"relative_mse": 1.0, "mass": 0.1}
    assert terms(Stage("lora", 1, 1e-3, loss="2*kl+0.5 * hidden")) == {"kl": 2.0, "hidden": 0.5}
    bad = {"kl": "unknown loss 'kl'", "mas": "unknown loss 'mas'", "x*mse": "read", "mse+mse": "read", "-1*mse": "read"}
    for loss, said in bad.items():
        with pytest.raises(UsageError, match=said) as error:
            terms(replace(STAGE, loss=loss))
        assert "loss" in str(error.value)
        assert error.value.fix


@pytest.mark.parametrize("name", ["relative_mse", "mse"])
def test_weights_weigh(name: str) -> None:
    """Weight 0 takes a token out: as if its output were the teacher's."""
    mixer, inputs, target = mixer_and_inputs(False)
    target, loss = target.transpose(1, 2), LAYER_LOSSES[name]
    weight = (torch.arange(TIME) >= 20).double().expand(2, -1)
    with torch.no_grad():
        output, _ = mixer(inputs)
        alike = torch.where(weight[..., None, None] > 0, target, output)
        part = loss(LayerCall(mixer, inputs, target, weight))
        whole = loss(LayerCall(mixer, inputs, alike))
    norms = [x.square().sum((1, 2, 3)) for x in (alike, target * weight[..., None, None])]
    factor = norms[0] / norms[1] if name == "relative_mse" else torch.tensor(2.0, dtype=torch.float64)
    if name == "mse":
        assert float(part) == pytest.approx(float(whole * factor), rel=1e-12)
    else:
        errors = (output - alike).square().sum((1, 2, 3)) / norms[1]
        assert float(part) == pytest.approx(float(errors.mean()), rel=1e-12)


def test_logit_losses() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 300, 11, dtype=torch.float64)
    student = student.clone().requires_grad_(True)
    weight, targets = torch.rand(300, dtype=torch.float64), torch.randint(0, 11, (300,))
    hidden = [(torch.randn(300, 5).double(), torch.randn(300, 5).double()) for _ in range(3)]
    call = LogitCall(student, targets, weight, teacher, 2.0, hidden)
    p, q = (x.div(2).softmax(-1) for x in (teacher, student))
    expected = {
        "kl": 4 * (weight * (p * (p / q).log()).sum(-1)).sum(),
        "ce": -(weight * student.log_softmax(-1)[torch.arange(300), targets]).sum(),
        "hidden": sum((weight * (a - b).norm(dim=-1) ** 2 / b.norm(dim=-1) ** 2).sum() for a, b in hidden) / 3,
    }
    assert LOGIT_LOSSES.keys() == expected.keys()
    for name, value in expected.items():
        found = LOGIT_LOSSES[name](call)
        assert found.item() == pytest.approx(value.item(), rel=1e-9), name
        if name != "hidden":
            own, by_autograd = (torch.autograd.grad(3 * x, student)[0] for x in (found, value))
            assert torch.allclose(own, by_autograd, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("kind", ["sliding", "terraced"])
@pytest.mark.parametrize("slots", [0, 3])
def test_a_narrowed_mixer_is_one_of_that_window(kind: str, slots: int) -> None:
    mixer, inputs, _ = mixer_and_inputs(True, window_kind=kind, slots=slots)
    stage = replace(STAGE, window_min=3, window_dropout=0.3)
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        window = drawn_window(stage, WINDOW)
        seen.add(window)
        small = Mixer(replace(mixer.spec, window=window), SHAPE).double()
        small.load_state_dict(mixer.state_dict())
        torch.manual_seed(seed)
        with torch.no_grad(), narrowed([mixer], stage):
            found = mixer(inputs)[0]
        assert torch.equal(found, small(inputs)[0])
    assert mixer.spec.window == WINDOW
    assert seen == {1, 3, 4, 5, 6}


@pytest.mark.parametrize("score", ["learned", "attention"])
def test_a_share_of_the_slots_is_a_mixer_with_fewer_whose_scores_fade_faster(score: str) -> None:
    spec = replace(make("default").point(), window=4, sinks=2, slots=5, slot_score=score, more_slots=4, more_heads=(1,))
    mixer, inputs = random_mixer(spec), random_inputs(tiny_shape(), 40, 2)
    small = random_mixer(replace(spec, slots=3, more_slots=2))
    for one in (mixer, small):
        if one.slot_score is not None:
            one.slot_score.rate.data.fill_(0.1)
    small.load_state_dict(mixer.state_dict())
    if small.slot_score is not None:
        small.slot_score.rate.data *= 2
    with torch.no_grad():
        before = mixer(inputs)[0]
        with narrowed([mixer], replace(STAGE, slot_share=0.5)):
            assert torch.equal(mixer(inputs)[0], small(inputs)[0])
        assert not torch.equal(before, small(inputs)[0])
        assert torch.equal(mixer(inputs)[0], before)


def test_far_weight_is_of_tokens_beyond_the_window() -> None:
    positions = torch.tensor([[*range(20), *range(5)]])
    spec = replace(make("default").point(), window=6, sinks=2)
    found = token_weight(replace(STAGE, far_weight=3.0), [spec], positions)
    assert found is not None
    assert found[0].tolist() == [1.0] * 8 + [3.0] * 12 + [1.0] * 5
    assert token_weight(STAGE, [spec], positions) is None


def test_a_stage_adds_its_losses_up() -> None:
    """By layer, the sum of the terms with their factors, and gradients of that sum."""
    model = convert_model(tiny_family("llama"), method="default", options={"window": 4})
    ids = torch.randint(2, 90, (2, 24))
    positions = torch.arange(24).expand(2, -1)
    losses = {}
    for loss in ("relative_mse", "mass", "0.5*relative_mse + 3*mass"):
        task = AttentionTransfer(model, replace(STAGE, loss=loss, far_weight=2.0))
        for p in model.parameters():
            p.requires_grad_(True)
        task.backward(ids, positions)
        grads = torch.cat([p.grad.flatten() for n, p in model.named_parameters() if ".linearize." in n and p.grad is not None])
        losses[loss] = (torch.tensor([task.by_layer[i] for i in sorted(task.by_layer)]), grads)
        model.zero_grad()
    (first, one), (second, other), (both, sum_) = losses.values()
    assert torch.allclose(both, 0.5 * first + 3 * second, rtol=1e-5)
    assert one.shape == other.shape == sum_.shape
    assert torch.allclose(sum_, 0.5 * one + 3 * other, rtol=1e-3, atol=1e-6)


def test_observed_calls_have_what_the_losses_need() -> None:
    """On a real layer: the mass loss of a calibrated start is finite, and falls when the far mass is fitted by it."""
    model = convert_model(tiny_family("llama"), method="default", options={"window": 4})
    ids = torch.randint(2, 90, (2, 24))
    calls: list[LayerCall] = []
    with torch.no_grad(), observed(model, lambda a, i, t: calls.append(LayerCall(a.linearize, i, t))), mode(model, "observe"):
        model(input_ids=ids)
    assert len(calls) == len(attentions(model))
    parameters = [p.requires_grad_(True) for call in calls for p in call.mixer.far_mass.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    seen = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = sum(LAYER_LOSSES["mass"](LayerCall(c.mixer, c.inputs, c.target)) for c in calls)
        loss.backward()
        optimizer.step()
        seen.append(float(loss))
    assert math.isfinite(seen[0])
    assert seen[-1] < seen[0]


@pytest.mark.parametrize("name", ["relative_mse", "mse", "mass"])
def test_a_batch_is_the_mean_of_its_rows(name: str) -> None:
    """With weights that differ from row to row too: so N processes average to the loss of one with all rows."""
    mixer, inputs, target = mixer_and_inputs(False)
    target, loss = target.transpose(1, 2), LAYER_LOSSES[name]
    weight = torch.stack([torch.ones(TIME), (torch.arange(TIME) >= 20) * 3.0]).double()
    with torch.no_grad():
        both = loss(LayerCall(mixer, inputs, target, weight))
        parts = []
        for row in (slice(0, 1), slice(1, 2)):
            own = replace(inputs, q=inputs.q[row], k=inputs.k[row], v=inputs.v[row])
            parts.append(loss(LayerCall(mixer, own, target[row], weight[row])))
    assert float(both) == pytest.approx(float(sum(parts)) / 2, rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"sliding": 5}, {"null": torch.tensor([0.3, -1, 2, 0])}], ids=["plain", "sliding", "null"])
def test_the_mass_of_the_teacher_is_that_of_what_it_sees(options: dict[str, Any]) -> None:
    _, inputs, target = mixer_and_inputs(False, Scores(0.5, **options))
    scores = inputs.score(inputs.q, inputs.k.repeat_interleave(2, 1))
    expected = scores.diagonal(dim1=2, dim2=3) - teacher_weights(inputs).diagonal(dim1=2, dim2=3).log()
    assert torch.allclose(Calibration(inputs, target.transpose(1, 2)).log_mass(), expected, rtol=1e-9)
