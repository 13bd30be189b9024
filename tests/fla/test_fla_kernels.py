"""Each kernel, called as the engines are, gives what the engine's oracle gives in float64: outputs, final state, gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from linearize.modeling import recurrence_additive, recurrence_delta
from linearize.modeling.backends import additive_chunked, additive_step, tied_chunked, tied_step
from linearize.testing.laws import assert_close

Stream = dict[str, Tensor | None]
STRENGTHS = {"weak": -0.05, "mixed": -2.0, "strong": -20.0}
DECAYS = [("none", "weak"), *((decay, strength) for decay in ("head", "channel") for strength in STRENGTHS)]
LENGTHS = (1, 5, 70)  # 64 tokens are a chunk
CANCELS = 1e-4  # under strong decay: kernels take differences of cumulative sums, up to 64 * 20 here


@pytest.fixture(autouse=True)
def by_fla(backend: Callable[[str], None]) -> None:
    backend("fla")


def stream(time: int, readers: int, decay: str, strength: str, device: torch.device) -> Stream:
    """q (1, 2, R, T, 6), unit keys with strengths, v (1, 2, T, 5), a state that is not empty."""
    sizes = {"none": None, "head": (time,), "channel": (time, 6)}[decay]
    made = {
        "q": torch.randn(1, 2, readers, time, 6),
        "unit": normalize(torch.randn(1, 2, time, 6), dim=-1),
        "beta": torch.rand(1, 2, time),
        "v": torch.randn(1, 2, time, 5),
        "g": None if sizes is None else STRENGTHS[strength] * torch.rand(1, 2, *sizes),
        "state": torch.randn(1, 2, 6, 5),
    }
    return {name: None if x is None else x.to(device) for name, x in made.items()}


def additive(form: Callable[..., tuple[Tensor, Tensor]], s: Stream) -> tuple[Tensor, Tensor]:
    return form(s["q"], s["unit"], s["v"], s["g"], s["state"])


def delta(form: Callable[..., tuple[Tensor, Tensor]], s: Stream, **options: int) -> tuple[Tensor, Tensor]:
    r, k, extra = s["unit"], s["unit"] * s["beta"][..., None], ()
    if s["g"] is not None:
        r = r * (s["g"] if s["g"].dim() == 4 else s["g"][..., None]).exp()
    if form in (tied_chunked, tied_step):
        extra = (s["unit"], s["beta"])
    return form(s["q"], r, None, k, s["v"], s["g"], *extra, s["state"], **options)


def evaluate(way: Callable[[Stream], tuple[Tensor, Tensor]], s: Stream, dtype: torch.dtype) -> dict[str, Tensor]:
    leaves = {name: x.to(dtype).requires_grad_() for name, x in s.items() if x is not None}
    out, last = way({**s, **leaves})
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=dtype, device=out.device).view_as(out)).sum() + last.sin().sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {"output": out.detach(), "state": last.detach(), **{f"gradient of {n}": x for n, x in zip(leaves, grads, strict=True)}}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    for name, x in found.items():
        assert_close(x.double(), expected[name], bound, name)


@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize(("decay", "strength"), DECAYS)
def test_additive(decay: str, strength: str, time: int, readers: int, device, bound: float, used: list[str]) -> None:
    s = stream(time, readers, decay, strength, device)
    found = evaluate(lambda s: additive(additive_chunked, s), s, torch.float32)
    expected = evaluate(lambda s: additive(recurrence_additive.reference, s), s, torch.float64)
    compare(found, expected, max(bound, CANCELS) if strength == "strong" else bound)
    assert used == ["channel chunked" if decay == "channel" else "head chunked"]


@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize(("decay", "strength"), [case for case in DECAYS if case[0] != "channel"])
def test_delta(decay: str, strength: str, time: int, readers: int, device, bound: float, used: list[str]) -> None:
    s = stream(time, readers, decay, strength, device)
    s["beta"][..., time // 2] = 0  # a pad
    found = evaluate(lambda s: delta(tied_chunked, s), s, torch.float32)
    expected = evaluate(lambda s: delta(recurrence_delta.reference, s), s, torch.float64)
    compare(found, expected, max(bound, CANCELS) if strength == "strong" else bound)
    assert used == ["delta chunked"]


def one(s: Stream) -> tuple[Stream, Stream]:
    """The only token without its time dimension: for the additive engine, and for the delta engine, which keeps that of updates."""
    q = s["q"][..., 0, :]
    return {**{n: x if x is None or n == "state" else x[:, :, 0] for n, x in s.items()}, "q": q}, {**s, "q": q}


@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize(("decay", "strength"), DECAYS)
def test_additive_step(decay: str, strength: str, readers: int, device, bound: float, used: list[str]) -> None:
    s = stream(1, readers, decay, strength, device)
    found = evaluate(lambda s: additive(additive_step, one(s)[0]), s, torch.float32)
    expected = evaluate(lambda s: additive(recurrence_additive.step, one(s)[0]), s, torch.float64)
    compare(found, expected, max(bound, CANCELS) if strength == "strong" else bound)
    assert used == ["channel step" if decay == "channel" else "head step"]


@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize(("decay", "strength"), [case for case in DECAYS if case[0] != "channel"])
def test_delta_step(decay: str, strength: str, readers: int, device, bound: float, used: list[str]) -> None:
    """Its kernel has no backward: with a gradient it is PyTorch."""
    s = stream(1, readers, decay, strength, device)
    expected = evaluate(lambda s: delta(recurrence_delta.step, one(s)[1]), s, torch.float64)
    out, last = delta(tied_step, one(s)[1])
    compare({"output": out, "state": last}, expected, bound)
    assert used == ["delta step"]
    compare(evaluate(lambda s: delta(tied_step, one(s)[1]), s, torch.float32), expected, bound)
    assert used == ["delta step"]


def test_states_keep_nothing_larger_alive(device) -> None:
    for time in (1, 5):
        s = stream(time, 2, "head", "weak", device)
        assert additive(additive_chunked, s)[1].untyped_storage().nbytes() == s["state"].nbytes
