"""The kernels for CPUs: each is its PyTorch form, in values and gradients, and so is every mixer that takes them."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from called_kernels import DEFAULT, LENGTHS, POINTS, SHAPE, both_halves, needs_kernels, recorded, wide, widened
from forms import STRENGTHS, compare, evaluate
from torch import Tensor

from linearize.modeling import native, native_ops, recurrence_additive
from linearize.modeling.convolution import convolved
from linearize.modeling.feature_maps_hedgehog import Hedgehog
from linearize.modeling.gates import OPEN
from linearize.modeling.mixer import Mixer
from linearize.modeling.native_decayed import decayed
from linearize.modeling.spec import MixerSpec
from linearize.modeling.stream import Inputs
from linearize.testing import random_inputs, randomise
from linearize.testing.laws import EXACT, assert_close, deviation, run


@pytest.fixture(autouse=True)
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are called."""
    return recorded(monkeypatch)


def by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEARIZE_BACKEND", "torch")


# ---- parts ----


@needs_kernels
@pytest.mark.parametrize("terraced", [0, 1, 5, 16, 64])
@pytest.mark.parametrize("values", [4, 16, 17])
def test_additive_engine(values: int, terraced: int, called: list[str]) -> None:
    for time, features in itertools.product(LENGTHS, (16, 48)):
        stream = [torch.randn(2, 3, *size) for size in ((2, time, features), (time, features), (time, values), (features, values))]
        expected = evaluate(_reference, [x.double() for x in stream], terraced=terraced)
        compare(evaluate(native_ops.additive, stream, terraced=terraced), expected, f"{time} tokens")
    assert set(called) == {"additive_forward", "additive_backward"}


def _reference(q: Tensor, k: Tensor, v: Tensor, state: Tensor, terraced: int) -> tuple[Tensor, Tensor]:
    return recurrence_additive.reference(q, k, v, None, state, terraced)


@needs_kernels
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("gates", ["head", "channel"])
@pytest.mark.parametrize("values, readers", [(4, 1), (17, 2)])
def test_decayed_engine(values: int, readers: int, gates: str, strength: str, called: list[str]) -> None:
    for time, features in itertools.product(LENGTHS, (16, 80)):
        sizes = (readers, time, features), (time, features), (time, values), (time, features)[: 1 + (gates == "channel")]
        q, k, v, g = (torch.randn(2, 3, *size) for size in sizes)
        stream = [q, k, v, STRENGTHS[strength] * g.abs(), torch.randn(2, 3, features, values)]
        expected = evaluate(recurrence_additive.reference, [x.double() for x in stream])
        compare(evaluate(decayed, stream), expected, f"{time} tokens")
    assert set(called) == {"decayed_forward", "decayed_backward"}


@needs_kernels
def test_decays_that_keep_nothing_everything_or_are_none(called: list[str]) -> None:
    q, k, v, state = torch.randn(1, 1, 1, 40, 16), torch.randn(1, 1, 40, 16), torch.randn(1, 1, 40, 8), torch.randn(1, 1, 16, 8)
    for decay in (0.0, -1e4, -torch.inf):
        g = torch.full((1, 1, 40), decay)
        expected = recurrence_additive.reference(*map(wide, (q, k, v, g, state)))
        for found, other in zip(decayed(q, k, v, g, state), expected, strict=True):
            assert_close(found, other, EXACT[torch.float32], str(decay))
    g[..., 20] = torch.nan
    assert decayed(q, k, v, g, state)[0].isnan().all(-1)[0, 0, 0].tolist() == [False] * 20 + [True] * 20


@needs_kernels
@pytest.mark.parametrize("taps", [1, 2, 4, 8])
@pytest.mark.parametrize("of_x", [True, False])
def test_convolution(of_x: bool, taps: int, called: list[str]) -> None:
    for time in LENGTHS:
        x, weight = torch.randn(2, 3, time + taps - 1, 48), torch.randn(taps, 3, 48)
        found, expected = (_convolved(change(x), change(weight), of_x) for change in (lambda x: x, wide))
        for own, other in zip(found, expected, strict=True):
            assert_close(own, other, EXACT[torch.float32], f"{time} tokens")
    assert set(called) == {"convolution_forward", "convolution_backward"}
    called.clear()
    convolved(torch.randn(1, 1, 20, 48), torch.randn(native_ops.TAPS + 1, 1, 48))
    assert not called


def _convolved(x: Tensor, weight: Tensor, of_x: bool) -> list[Tensor]:
    x, weight = x.clone().requires_grad_(of_x), weight.clone().requires_grad_()
    y = convolved(x, weight)
    slopes = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y.detach(), *torch.autograd.grad((y * slopes).sum(), [weight, *([x] if of_x else [])])]


@needs_kernels
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("steep", [1.0, 30.0])
def test_sigmoid_gate(steep: float, biased: bool, called: list[str]) -> None:
    """Gates that are nearly open too: how nearly must not be lost."""
    for time in LENGTHS:
        y, bias = steep * torch.randn(2, time, 3 * 32), torch.randn(3 * 32) + OPEN if biased else None
        own, expected = (_gated(change(y), change(bias)) for change in (lambda x: x, wide))
        for part, other in zip(own, expected, strict=True):
            assert_close(part, other, EXACT[torch.float32], f"{time} tokens")
        shares = own[0].clamp(max=-1e-30) / expected[0].clamp(max=-1e-30)
        assert_close(shares, torch.ones_like(shares), EXACT[torch.float32], "each relative to itself")
    assert set(called) == {"gate_forward", "gate_backward"}


def _gated(y: Tensor, bias: Tensor | None) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (y, bias) if x is not None]
    if y.dtype == torch.float32:
        out = native_ops.log_sigmoid(leaves[0], *leaves[1:] or [None], 3, 16.0)
    else:
        out = torch.nn.functional.logsigmoid(sum(leaves)).unflatten(-1, (3, -1)).transpose(1, 2) / 16
    slopes = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).sin().view_as(out)
    return [out.detach(), *torch.autograd.grad((out * slopes).sum(), leaves)]


@needs_kernels
@pytest.mark.parametrize("dim, columns", [(16, 16), (8, 32), (20, 48)])
@pytest.mark.parametrize("of_x", [True, False])
def test_hedgehog_map(of_x: bool, dim: int, columns: int, called: list[str]) -> None:
    feature_map = Hedgehog(3, dim, MixerSpec(feature_map="hedgehog", feature_dim=columns), "q")
    with torch.no_grad():
        feature_map.weight.add_(torch.randn_like(feature_map.weight))
    for time in LENGTHS:
        x = 4 * torch.randn(2, time, 3, dim).transpose(1, 2)  # as projections leave it
        weight = torch.randn(2, 3, time, 2 * columns)
        found, expected = (_map_gradients(feature_map, change(x), change(weight), of_x) for change in (lambda x: x, wide))
        for own, other in zip(found, expected, strict=True):
            assert_close(own, other, EXACT[torch.float32], f"{time} tokens")
    assert set(called) == {"hedgehog_forward", "hedgehog_backward"}


def _map_gradients(feature_map: Hedgehog, x: Tensor, weight: Tensor, of_x: bool) -> list[Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_(of_x)
    out = feature_map(x)
    wanted = [feature_map.weight, *([x] if of_x else [])]
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), wanted)]


# ---- mixers ----


def _mixer(spec: MixerSpec) -> Mixer:
    torch.manual_seed(0)
    return randomise(Mixer(spec, SHAPE))


def _packed(inputs: Inputs, time: int) -> Inputs:
    return replace(inputs, segments=(torch.arange(time) // 23).expand(2, -1))


def _padded(inputs: Inputs, time: int) -> Inputs:
    return replace(inputs, mask=torch.stack([torch.arange(time) >= 9, torch.ones(time)]).long())


@needs_kernels
@pytest.mark.parametrize("name", POINTS)
def test_every_mixer_is_what_it_is_in_float64(name: str) -> None:
    """In one call with gradients, packed, padded, and in calls of several sizes with the state carried."""
    spec, time = POINTS[name], 75
    mixer, inputs = _mixer(spec), random_inputs(SHAPE, time, dtype=torch.float32, softcap=None)
    other = _mixer(spec).double()
    bound = 2e-3  # random maps and gates are steep: what is compared is rounded in float32 on the way in both forms
    for change in (lambda x, _: x, _packed, _padded):
        own = change(inputs, time)
        found, expected = _with_parameters(mixer, own), _with_parameters(other, widened(own))
        for part in expected:
            assert_close(found[part], expected[part], bound, part)
    if spec.causal and spec.state_dtype == "float32" and not spec.slots:
        with torch.no_grad():
            found_out, state = run(mixer, inputs, [40, 1, 20])
            expected_out, expected_state = run(other, widened(inputs), [40, 1, 20])
        assert_close(found_out, expected_out, bound, "in calls")
        if "far" in state:
            assert_close(state["far"], expected_state["far"], bound, "state")


def _with_parameters(mixer: Mixer, inputs: Inputs) -> dict[str, Tensor]:
    """Outputs without and with gradients of the parameters, and these."""
    with torch.no_grad():
        found = {"without gradients": mixer(inputs)[0]}
    wanted = dict(mixer.named_parameters())
    out = mixer(inputs)[0]
    found["output"] = out.detach()
    if wanted and out.requires_grad:
        weight = torch.linspace(-1, 1, out.numel()).sin().view_as(out)
        grads = torch.autograd.grad((out * weight).sum(), list(wanted.values()), allow_unused=True, materialize_grads=True)
        found |= {f"gradient of {name}": x for name, x in zip(wanted, grads, strict=True)}
    return found


@needs_kernels
@both_halves
def test_both_halves_in_one_pass(changes: dict[str, Any], window: int, sinks: int, called: list[str]) -> None:
    """Rows that have seen different numbers of tokens go on, over several chunks and several of what is computed at once."""
    spec = replace(DEFAULT, window=window, sinks=sinks, **changes)
    mixer, other = _mixer(spec), _mixer(spec).double()
    inputs = random_inputs(SHAPE, 700, dtype=torch.float32, softcap=None)
    with torch.no_grad():
        for sizes in ([700], [1, 2, 66, 130], [300, 1, 1]):
            called.clear()
            (found, state), (expected, last) = run(mixer, inputs, sizes), run(other, widened(inputs), sizes)
            assert called.count("hybrid_forward") == 1 + sum(size > 1 for size in sizes[1:]) + (sum(sizes) < 699)
            assert deviation(found, expected) < 5e-5
            assert deviation(state["far"], last["far"]) < 5e-5


@needs_kernels
def test_rows_of_different_lengths_go_on(called: list[str]) -> None:
    mixer, other = _mixer(DEFAULT), _mixer(DEFAULT).double()
    first, more = (random_inputs(SHAPE, time, dtype=torch.float32, softcap=None) for time in (90, 33))
    first = _padded(first, 90)
    with torch.no_grad():
        states = [m(x, keep=True)[1] for m, x in ((mixer, first), (other, widened(first)))]
        called.clear()
        found, expected = mixer(more, states[0])[0], other(widened(more), states[1])[0]
    assert called == ["hybrid_forward"]
    assert deviation(found, expected) < 5e-5


@needs_kernels
def test_weights_of_another_type(called: list[str]) -> None:
    """A model that was brought to bfloat16 as a whole has its maps in it: what reads them as float32 must not."""
    mixer, inputs = _mixer(DEFAULT).bfloat16(), random_inputs(SHAPE, 90, dtype=torch.float32, softcap=None)
    other = _mixer(DEFAULT).bfloat16().double()
    with torch.no_grad():
        assert deviation(mixer(inputs)[0], other(widened(inputs))[0]) < 1e-4
    assert "hybrid_forward" not in called


# ---- who is asked ----


@needs_kernels
def test_what_kernels_do_not_take_pytorch_computes(called: list[str]) -> None:
    mixer, inputs = _mixer(DEFAULT), random_inputs(SHAPE, 20, dtype=torch.float32)
    x = torch.randn(2, 3)
    for other in (x.double(), x.bfloat16(), x[:0], x.to("meta"), x.as_subclass(type("Own", (Tensor,), {}))):
        assert not native.takes(x, other)
    assert native.takes(x, None)
    _mixer(DEFAULT).double()(widened(inputs))
    assert not called
    with torch.no_grad():
        mixer(inputs)  # with a softcap: the window and the merge of a pass over all stay PyTorch's
    assert not {"window_attend", "hybrid_forward"} & set(called)


@needs_kernels
@pytest.mark.parametrize("asked", ["torch", "fla"])
def test_none_where_another_is_asked_for(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEARIZE_BACKEND", asked)
    assert not native.takes(torch.ones(1))


def test_without_a_compiler_pytorch_computes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "attempt", lambda: RuntimeError(f"no such compiler\n{'and so on ' * 20}"))
    monkeypatch.setenv("LINEARIZE_BACKEND", "auto")
    assert not native.takes(torch.ones(1))
    monkeypatch.setenv("LINEARIZE_BACKEND", "native")
    with pytest.raises(ImportError, match=r"compiler with OpenMP and ninja, .*: no such compiler and so .{,90}$"):
        native.takes(torch.ones(1))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("ninja") or not shutil.which("c++"), reason="needs a C++ compiler and ninja")
@pytest.mark.parametrize("capability", ["avx512", "avx2"])
def test_built_once_and_kept(capability: str, tmp_path: Path) -> None:
    """In a cache of its own; a second process finds it there, and what cannot be kept is no error."""
    able = torch.backends.cpu.get_cpu_capability().lower()
    if able not in ("avx512", capability):
        pytest.skip(f"this processor has {able}")
    code = "from linearize.modeling import native; print(native.library() is not None)"
    environment = {"PATH": sys.exec_prefix + "/bin:/usr/bin:/bin", "ATEN_CPU_CAPABILITY": capability}
    for cache in (tmp_path, tmp_path, Path("/proc/nowhere")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**environment, "XDG_CACHE_HOME": str(cache)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == str(cache == tmp_path)
    assert [path.suffix for path in (tmp_path / "linearize").iterdir()] == [".so"]
