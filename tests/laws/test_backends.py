"""Who computes an engine: on a CPU nothing of fla, whatever can be imported; what its kernels are given, if asked."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from linearize.modeling import backends, recurrence_additive, recurrence_delta
from linearize.testing import method_points, random_inputs, random_mixer, tiny_shape
from linearize.testing.laws import EXACT, assert_close, run

OPS = ("fla.ops", "fla.ops.gated_delta_rule", "fla.ops.gla", "fla.ops.simple_gla")
POINTS = {point.id: point.spec for point in method_points()}
MIXERS = ("default", "gla", "simple-gla", "gated-deltanet", "kda", "rwkv7", "gsa", "gateloop")


class OnGpu(Tensor):
    is_cuda = True


class Untouchable(ModuleType):
    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{self.__name__}.{name} was used")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("LINEARIZE_BACKEND", raising=False)
    found = backends.kernels
    found.cache_clear()
    yield
    found.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """An fla of that version that can be imported, and whose kernels cannot be touched."""
    fla = ModuleType("fla")
    fla.__version__ = version
    monkeypatch.setitem(sys.modules, "fla", fla)
    for name in OPS:
        monkeypatch.setitem(sys.modules, name, Untouchable(name))


def no_fla(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla", None)


@pytest.mark.parametrize("asked", [None, "auto", "torch"])
@pytest.mark.parametrize("name", MIXERS)
def test_a_cpu_does_without_fla_though_it_can_be_imported(name: str, asked: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, inputs = random_mixer(POINTS[name], dtype=torch.float32), random_inputs(tiny_shape(), 9, dtype=torch.float32)
    no_fla(monkeypatch)
    if asked:
        monkeypatch.setenv("LINEARIZE_BACKEND", asked)
    with torch.no_grad():
        expected = run(mixer, inputs, [7, 1, 1])[0]
        install(monkeypatch, "0.6.0")
        assert torch.equal(run(mixer, inputs, [7, 1, 1])[0], expected)
    assert backends.kernels.cache_info().misses == 0


def test_that_fla_would_have_been_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "0.6.0")
    with pytest.raises(AssertionError, match=r"fla\.ops.* was used"):
        backends.by_kernel(torch.ones(1).as_subclass(OnGpu))
    monkeypatch.setenv("LINEARIZE_BACKEND", "fla")
    with pytest.raises(AssertionError, match=r"fla\.ops.* was used"):
        backends.by_kernel(torch.ones(1))


@pytest.mark.parametrize("version", [None, "0.5.9", "0.60.0", "1.0"])
def test_a_gpu_runs_pytorch_without_an_fla_that_is_known(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if version:
        install(monkeypatch, version)
    else:
        no_fla(monkeypatch)
    assert not backends.by_kernel(torch.ones(1).as_subclass(OnGpu))
    monkeypatch.setenv("LINEARIZE_BACKEND", "fla")
    with pytest.raises(ImportError, match=r"flash-linear-attention 0\.6"):
        backends.by_kernel(torch.ones(1))


@pytest.mark.parametrize("asked", ["", "cuda", "FLA"])
def test_another_name_is_refused(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEARIZE_BACKEND", asked)
    mixer, inputs = random_mixer(POINTS["hedgehog"]), random_inputs(tiny_shape(), 5)
    with pytest.raises(ValueError, match=f"LINEARIZE_BACKEND must be one of auto, torch, native, fla, got '{asked}'"):
        mixer(inputs)


# ---- what kernels are given, with stand-ins for fla's that read its layout ----


def by_heads(x: Tensor) -> Tensor:
    """(B, T, H, ...) as (B, H, T, ...)."""
    return x.transpose(1, 2)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins: the engines' oracles, called as fla's kernels are. Returns the names of those called."""
    names: list[str] = []

    def stand_in(name: str, decay: str, delta: bool) -> Callable[..., tuple[Tensor, Tensor]]:
        def kernel(
            q: Tensor, k: Tensor, v: Tensor, scale: float, initial_state: Tensor, output_final_state: bool, **own: Tensor
        ) -> Any:
            assert set(own) <= {decay, *(["beta"] if delta else [])}
            assert scale == 1
            assert output_final_state
            assert q.shape == k.shape == (*v.shape[:3], q.shape[-1])
            assert initial_state.shape == (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
            names.append(name)
            g = by_heads(own[decay]) if decay in own else None
            q, k, v = by_heads(q)[:, :, None], by_heads(k), by_heads(v)
            if not delta:
                out, last = recurrence_additive.reference(q, k, v, g, initial_state)
            else:
                r = k if g is None else k * g[..., None].exp()
                out, last = recurrence_delta.reference(q, r, None, k * by_heads(own["beta"])[..., None], v, g, initial_state)
            return by_heads(out[:, :, 0]), last

        return kernel

    kinds = {
        "head chunked": "g",
        "head step": "g",
        "channel chunked": "g",
        "channel step": "gk",
        "delta chunked": "g",
        "delta step": "g",
    }
    found = {name: stand_in(name, decay, name.startswith("delta")) for name, decay in kinds.items()}
    monkeypatch.setattr(backends, "kernels", lambda: found)
    monkeypatch.setenv("LINEARIZE_BACKEND", "fla")
    return names


GIVEN = {
    "default": ["head"], "hedgehog": ["head"], "simple-gla": ["head"], "retnet": ["head"], "gla": ["channel"], "liger": ["channel"],
    "gated-deltanet": ["delta"], "deltanet": ["delta"], "mom": ["delta"], "kda": [], "deltaproduct": [], "rwkv7": [], "gsa": [],
    "gateloop": [],
}  # fmt: skip


@pytest.mark.parametrize("name", GIVEN)
def test_mixers_by_kernel(name: str, called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, inputs = random_mixer(POINTS[name], dtype=torch.float32), random_inputs(tiny_shape(), 11, dtype=torch.float32)
    with torch.no_grad():
        found, state = run(mixer, inputs, [9, 1, 1])
        assert set(called) == {f"{kernel} {form}" for kernel in GIVEN[name] for form in ("chunked", "step")}
        monkeypatch.setenv("LINEARIZE_BACKEND", "torch")
        expected, last = run(mixer, inputs, [9, 1, 1])
    assert_close(found, expected, EXACT[torch.float32], "output")
    assert_close(state["far"], last["far"], EXACT[torch.float32], "state")
    assert state["far"].untyped_storage().nbytes() == state["far"].nbytes


def test_blocks_and_float64_have_no_kernel(called: list[str]) -> None:
    for dtype, name in ((torch.float32, "lolcats-window_kind=terraced-share_kv=True"), (torch.float64, "gla")):
        random_mixer(POINTS[name], dtype=dtype)(random_inputs(tiny_shape(), 11, dtype=dtype))
    assert not called


def tied(features: int, form: Callable[..., Any], time: int, gradient: bool = False) -> None:
    unit, beta, g = normalize(torch.randn(1, 1, time, features), dim=-1), torch.rand(1, 1, time), -torch.rand(1, 1, time)
    q, v, state = torch.randn(1, 1, 1, time, features), torch.randn(1, 1, time, 3), torch.zeros(1, 1, features, 3)
    q = (q[..., 0, :] if form is backends.tied_step else q).requires_grad_(gradient)
    form(q, unit * g[..., None].exp(), None, unit * beta[..., None], v, g, unit, beta, state)


def test_limits_of_delta_kernels(called: list[str]) -> None:
    """256 features; and no gradient through one token."""
    tied(257, backends.tied_chunked, 3)
    tied(257, backends.tied_step, 1)
    tied(8, backends.tied_step, 1, gradient=True)
    assert not called
    tied(256, backends.tied_chunked, 3, gradient=True)
    tied(256, backends.tied_step, 1)
    assert called == ["delta chunked", "delta step"]
