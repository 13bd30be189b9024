"""Sequence parallel: parts of a text in several processes are the text in one, in outputs and gradients, or they are refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from processes import together
from torch import Tensor
from torch import distributed as dist

from linearize.distillation.sequence_memory import Summary, gathering
from linearize.distillation.sequence_mixer import Part, mix, refusal, shortest
from linearize.modeling.mixer import Mixer
from linearize.modeling.spec import MixerSpec
from linearize.modeling.stream import Inputs
from linearize.testing import bidirectional_points, method_points, pairwise_points, random_inputs, random_mixer, tiny_shape
from linearize.testing.laws import BY_HEAD, EXACT, LEAVES, deviation, part

EVERY = {p.id: p.spec for p in (*method_points(), *pairwise_points(), *bidirectional_points())}
SPLIT = {name: spec for name, spec in EVERY.items() if refusal(spec) is None}
KV_HEADS = {name: 4 if i % 2 else 2 for i, name in enumerate(SPLIT)}  # GQA or MHA in turn


def whole_and_parts(
    spec: MixerSpec,
    kv_heads: int,
    cuts: list[int],
    group: dist.ProcessGroup,
    documents: list[list[int]] | None = None,
    batch: int = 2,
) -> dict[str, float]:
    """How far this process's part of a text, cut at `cuts`, is from the same tokens of the whole: output and gradients."""
    mixer, inputs = random_mixer(spec, kv_heads), random_inputs(tiny_shape(kv_heads), cuts[-1], batch)
    rank, time = group.rank(), cuts[-1]
    start, stop = cuts[rank], cuts[rank + 1]
    position = torch.arange(time).expand(batch, -1)
    if documents is not None:
        begins = torch.zeros(2, time, dtype=torch.long)
        for row, own in enumerate(documents):
            begins[row, own] = 1
        inputs = replace(inputs, segments=begins.cumsum(1))
        position = position - (position * begins).cummax(1).values
    weight = torch.linspace(-1, 1, batch * time * 32, dtype=torch.float64).sin().view(batch, time, 4, 8)
    whole = gradients(mixer, inputs, lambda x: mixer(x)[0], weight)
    own, there = part(inputs, start, stop), Part(group, position[:, start])
    mine = gradients(mixer, own, lambda x: mix(mixer, x, there), weight[:, start:stop])
    found = {"output": deviation(mine.pop("output"), whole.pop("output")[:, start:stop])}
    for name, grad in mine.items():
        if name in LEAVES:
            expected = whole[name].narrow(2 if name in BY_HEAD else 1, start, stop - start)
        else:
            dist.all_reduce(grad, group=group)
            expected = whole[name]
        found[f"gradient of {name}"] = deviation(grad, expected)
    return found


def gradients(mixer: Mixer, inputs: Inputs, way: Any, weight: Tensor) -> dict[str, Tensor]:
    leaves = {name: getattr(inputs, name).clone().requires_grad_() for name in LEAVES}
    wanted = {**leaves, **dict(mixer.named_parameters())}
    out = way(replace(inputs, **leaves))
    grads = torch.autograd.grad((out * weight).sum(), list(wanted.values()), allow_unused=True, materialize_grads=True)
    return {"output": out.detach(), **dict(zip(wanted, grads, strict=True))}


def cuts_for(spec: MixerSpec, parts: int) -> list[int]:
    """Parts of other lengths than whole windows, the shortest as short as allowed."""
    least, cuts = shortest(spec), [0]
    for i in range(parts):
        cuts.append(cuts[-1] + least + (5, 0, 7, 2)[i])
    return cuts


DOCUMENTS = [[3, 4, 11, 31], [19, 33, 40]]


def every_point(step: int) -> dict[str, dict[str, float]]:
    """Every `step`-th point in four processes, whole and as packed documents; a third of them in two."""
    four, two = dist.new_group([0, 1, 2, 3]), dist.new_group([0, 1])
    found = {}
    for number, (name, spec) in list(enumerate(SPLIT.items()))[::step]:
        run = partial(whole_and_parts, spec, KV_HEADS[name])
        cuts = cuts_for(spec, 4)
        found[f"{name} in 4"] = run(cuts, four)
        documents = [[at for at in row if at < cuts[-1]] + [cuts[1 + i], cuts[-1] - 1] for i, row in enumerate(DOCUMENTS)]
        found[f"{name} packed in 4"] = run(cuts, four, documents)
        if number % 3 == 0 and dist.get_rank() < 2:
            found[f"{name} in 2"] = run(cuts_for(spec, 2), two)
    return found


def check(folder: Any, step: int) -> None:
    wrong = []
    for rank, found in enumerate(together(4, folder, every_point, step)):
        assert len(found) >= 2 * (len(SPLIT) // step)
        for name, errors in found.items():
            wrong += [f"{name}, process {rank}, {what}: {e:.1e}" for what, e in errors.items() if not e <= EXACT[torch.float64]]
    assert not wrong, "\n".join(wrong[:40])


def test_points_in_processes(tmp_path: Any) -> None:
    check(tmp_path, 4)


@pytest.mark.exhaustive
def test_every_point_in_processes(tmp_path: Any) -> None:
    check(tmp_path, 1)


LONG = ("default", "lawcat", "gla", "gateloop", "gsa", "gated-deltanet", "deltaproduct", "rwkv7")


def long_texts() -> dict[str, dict[str, float]]:
    group = dist.new_group([0, 1, 2, 3])
    return {name: whole_and_parts(SPLIT[name], 2, [0, 4096, 8192, 12288, 16384], group, batch=1) for name in LONG}


@pytest.mark.exhaustive
def test_16k_tokens_in_4_processes(tmp_path: Any) -> None:
    for found in together(4, tmp_path, long_texts):
        assert len(found) == len(LONG)
        for name, errors in found.items():
            assert max(errors.values()) <= EXACT[torch.float64], (name, errors)


@pytest.mark.parametrize("name", LONG)
def test_what_is_gathered_does_not_grow_with_the_text(name: str) -> None:
    sizes = []
    for time in (16, 256):
        mixer, seen = random_mixer(SPLIT[name]), []

        def keep(mine: Summary, seen: list[Any] = seen) -> Tensor:
            seen.append([x.shape for x in mine])
            return torch.zeros_like(mine[1])

        mixer.engine = (gathering(mixer.spec, mixer.engine[0], keep), None)
        mixer(random_inputs(tiny_shape(), time))
        sizes.append(seen)
    assert len(sizes[0]) == 1, "one gather"
    assert sizes[0] == sizes[1]


def test_what_is_refused() -> None:
    """Slots and encoders, and no other point; parts that the window reaches over; pads."""
    for name, spec in EVERY.items():
        assert (refusal(spec) is not None) == bool(spec.slots or not spec.causal or spec.kv_dtype != "model"), name
    mixer, inputs = random_mixer(SPLIT["default"]), random_inputs(tiny_shape(), 9)
    nobody = Part(None, torch.zeros(2, dtype=torch.long))  # refused before anything is sent
    with pytest.raises(ValueError, match="part of 3 tokens is shorter than the 4"):
        mix(mixer, inputs.first(3), nobody)
    with pytest.raises(ValueError, match="pads"):
        mix(mixer, replace(inputs, mask=torch.arange(9).expand(2, 9) > 0), nobody)
    with pytest.raises(ValueError, match="given away in order"):
        mix(random_mixer(next(s for s in EVERY.values() if s.slots and not s.scores_recall)), inputs, nobody)
    with pytest.raises(ValueError, match="reads the memory as it was"):
        mix(random_mixer(next(s for s in EVERY.values() if s.scores_recall)), inputs, nobody)
