"""The kernels for the near half and its merge with a memory: what PyTorch computes in float64, in values and gradients."""

from __future__ import annotations

import gc
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from called_kernels import DEFAULT, LENGTHS, SHAPE, both_halves, needs_kernels, recorded, same_part, wide, widened
from torch import Tensor

from linearize.modeling import native_ops
from linearize.modeling.attention import softmax_attention
from linearize.modeling.mixer import Mixer
from linearize.modeling.spec import MixerSpec
from linearize.modeling.stream import Inputs
from linearize.modeling.window import Part, Scores, near_chunked
from linearize.testing import random_inputs, randomise
from linearize.testing.laws import EXACT, assert_close

pytestmark = needs_kernels
HYBRID = replace(DEFAULT, window=64, sinks=4)


@pytest.fixture(autouse=True)
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are called."""
    return recorded(monkeypatch)


@pytest.mark.parametrize("kind", ["sliding", "terraced"])
@pytest.mark.parametrize("window, sinks", [(1, 0), (5, 3), (16, 4), (40, 20)])
def test_window(window: int, sinks: int, kind: str, called: list[str]) -> None:
    spec = MixerSpec(feature_map="hedgehog", merge="denominator", coverage="older", window=window, sinks=sinks, window_kind=kind)
    for time, (lead, seen) in itertools.product(LENGTHS, ((window, [0, 0]), (spec.recent, [0, 0]), (spec.recent, [3, 100]))):
        q, k, v = (
            torch.randn(2, time, 4, 16).transpose(1, 2).unflatten(1, (2, 2)),
            *(torch.randn(2, 2, lead + time, 16) for _ in "kv"),
        )
        sink_k, sink_v = torch.randn(2, 2, sinks, 16), torch.randn(2, 2, sinks, 16)
        given = (q, k, v, sink_k, sink_v, torch.tensor(seen), lead, spec, Scores(0.3))
        for until in (None, torch.tensor(seen) + torch.tensor([time, time // 2])):
            found, expected = near_chunked(*given, until), near_chunked(*map(wide, given), until)
            same_part(found[0], expected[0], f"{time} tokens after {seen}")
            if found[1] is not None and expected[1] is not None:
                assert_close(found[1], expected[1], EXACT[torch.float32], f"received, {time} tokens after {seen}")
    assert set(called) == {"window_attend"}


@pytest.mark.parametrize("kind", ["sliding", "terraced"])
@pytest.mark.parametrize(
    "window, sinks, dim, width", [(1, 0, 16, 16), (5, 3, 20, 24), (16, 4, 16, 16), (40, 20, 16, 32), (200, 4, 16, 16)]
)
def test_gradients_of_a_window(window: int, sinks: int, dim: int, width: int, kind: str, called: list[str]) -> None:
    """Over several segments, whose keys overlap, and with rows that have seen different numbers of tokens."""
    spec = MixerSpec(feature_map="hedgehog", merge="denominator", coverage="older", window=window, sinks=sinks, window_kind=kind)
    for time, (lead, seen) in itertools.product((1, 17, 300), ((window, [0, 0]), (spec.recent, [0, 0]), (spec.recent, [3, 1000]))):
        stream = [torch.randn(2, time, 4, dim).transpose(1, 2).unflatten(1, (2, 2))]
        stream += [torch.randn(2, 2, n, size) for n in (lead + time, sinks) for size in (dim, width)]
        rest = (torch.tensor(seen), lead, spec, Scores(0.3))
        for own, other in zip(_window_gradients(stream, *rest), _window_gradients(list(map(wide, stream)), *rest), strict=True):
            assert_close(own, other, EXACT[torch.float32], f"{time} tokens after {seen}")
    assert set(called) == {"window_attend", "window_backward"}


def _window_gradients(stream: list[Tensor], *rest: Any) -> list[Tensor]:
    """Of what a memory of mass 1 would make of the part: its maximum may be any, as long as both forms have the same output."""
    q, k, v, sink_k, sink_v = leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in stream]
    part = near_chunked(q, k, v, sink_k, sink_v, *rest)[0]
    known = part.top.isfinite()
    scale = torch.where(known, part.top, 0.0).exp()
    out = part.numerator * (scale / (part.denominator * scale + 1))[..., None]
    slopes = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).sin().view_as(out)
    return list(torch.autograd.grad((out * slopes).sum(), leaves, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("sliding", [None, 1, 20])
def test_softmax_of_a_whole_text(sliding: int | None, called: list[str]) -> None:
    for time in LENGTHS:
        inputs = random_inputs(SHAPE, time, dtype=torch.float32, softcap=None)
        inputs = replace(inputs, score=replace(inputs.score, sliding=sliding))
        expected = softmax_attention(widened(inputs))
        assert_close(softmax_attention(inputs), expected, EXACT[torch.float32], f"{time} tokens")
    assert set(called) == {"window_attend"}


@pytest.mark.parametrize("empty", [False, True])
def test_merge(empty: bool, monkeypatch: pytest.MonkeyPatch, called: list[str]) -> None:
    """Some memories are empty, and some weigh more, or less, than what they are merged with."""
    mixer = randomise(Mixer(HYBRID, SHAPE))
    for time in LENGTHS:
        near = Part(torch.randn(2, 4, time, 16), torch.rand(2, 4, time) + 0.1, 3 * torch.randn(2, 4, time))
        read, factor = torch.randn(2, 4, time, 17), 5 * torch.randn(2, 4, time)
        read[..., -1] = read[..., -1].abs() * (torch.rand(2, 4, time) > 0.3 if not empty else 0)
        read = read * (read[..., -1:] > 0)
        given = near, read, factor
        found, expected = (_merged(mixer, *arguments) for arguments in (given, _wide_part(*given)))
        for own, other in zip(found, expected, strict=True):
            assert_close(own, other, EXACT[torch.float32], f"{time} tokens")
    assert set(called) == {"merge_forward", "merge_backward"}


def _wide_part(near: Part, read: Tensor, factor: Tensor) -> tuple[Part, Tensor, Tensor]:
    return Part(near.numerator.double(), near.denominator.double(), near.top.double()), read.double(), factor.double()


def _merged(mixer: Mixer, near: Part, read: Tensor, factor: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (near.numerator, near.denominator, read, factor)]
    numerator, denominator, read, factor = leaves
    if read.dtype == torch.float32:
        out = native_ops.merge(numerator, denominator, near.top, read, factor)
    else:
        mass = read[..., -1]
        far = read[..., :-1] / torch.where(mass > 0, mass, torch.inf)[..., None]
        out = mixer.merge(Part(numerator, denominator, near.top), far, mass, factor, None)
    weight = torch.linspace(-1, 1, out.numel()).sin().view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


# ---- both halves, with gradients ----

WANTED = (("q", "k", "v"), ("map_q.weight", "map_k.weight"), ("v", "map_k.weight", "far_mass.query"), None)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was asked of both halves as one function with gradients."""
    taken: list[Any] = []
    original = Mixer._trained
    monkeypatch.setattr(Mixer, "_trained", lambda self, *given: taken.append(given) or original(self, *given))
    return taken


@both_halves
def test_gradients_of_both_halves(changes: dict[str, Any], window: int, sinks: int, called: list[str], trained: list[Any]) -> None:
    """Of whole texts, by what the stage trains; None: all there is."""
    spec = replace(DEFAULT, window=window, sinks=sinks, **changes)
    mixer, other = (randomise(Mixer(spec, SHAPE)) for _ in "ab")
    other.load_state_dict(mixer.state_dict())
    other.double()
    for time, wanted in itertools.product((window + sinks + 1, window + sinks + 64, 230), WANTED):
        inputs = random_inputs(SHAPE, time, dtype=torch.float32, softcap=None)
        if wanted and spec.far_mass != "query":
            wanted = tuple(name for name in wanted if not name.startswith("far_mass"))
        called.clear()
        trained.clear()
        found = _gradients(mixer, inputs, wanted)
        assert len(trained) == 1
        assert {"merge_backward", "additive_backward"} <= set(called)
        assert ("window_backward" in called) == (wanted is None or not {"q", "k", "v"}.isdisjoint(wanted))
        for name, expected in _gradients(other, widened(inputs), wanted).items():
            assert_close(found[name], expected, 2e-4, f"{name}, {time} tokens, {wanted}")


def _gradients(mixer: Mixer, inputs: Inputs, wanted: tuple[str, ...] | None) -> dict[str, Tensor]:
    """The output, and gradients by name."""
    known = dict(mixer.named_parameters())
    stream = {name: getattr(inputs, name).clone().requires_grad_() for name in "qkv" if wanted is None or name in wanted}
    for name, parameter in known.items():
        parameter.requires_grad_(wanted is None or name in wanted)
    leaves = stream | {name: x for name, x in known.items() if x.requires_grad}
    out = mixer(replace(inputs, **stream))[0]
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).sin().view_as(out)
    grads = torch.autograd.grad((out * weight).sum(), list(leaves.values()))
    return {"output": out.detach(), **dict(zip(leaves, grads, strict=True))}


def test_both_halves_are_one_function_where_they_are_trained_and_no_state_is_kept(trained: list[Any]) -> None:
    mixer = randomise(Mixer(HYBRID, SHAPE))
    short, long = (random_inputs(SHAPE, time, dtype=torch.float32, softcap=None) for time in (68, 69))
    mixer(long, keep=True)
    mixer(short)
    mixer(replace(long, segments=torch.zeros(2, 69, dtype=torch.long)))
    with torch.no_grad():
        mixer(long)
    assert not trained
    mixer(long)
    assert len(trained) == 1


def test_a_graph_that_was_gone_through_is_freed() -> None:
    """Its tensors hold no one another: no garbage collection is due."""
    mixer, inputs = randomise(Mixer(HYBRID, SHAPE)), random_inputs(SHAPE, 100, dtype=torch.float32, softcap=None)
    there: list[int] = []
    gc.disable()
    try:
        for _ in range(3):
            mixer(inputs)[0].sum().backward()
            there.append(sum(issubclass(type(x), Tensor) for x in gc.get_objects()))
    finally:
        gc.enable()
    assert there[1] == there[2]
