"""Whole mixers with kernels are the same mixers in PyTorch: outputs and gradients, prefill and decode, pads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from linearize.modeling.mixer import Mixer
from linearize.modeling.spec import MixerSpec
from linearize.modeling.stream import Inputs
from linearize.testing import method_points, random_inputs, random_mixer, tiny_shape
from linearize.testing.laws import STREAMS, assert_close, run

TIME = 37
BY_KERNEL = {
    "hedgehog": "head", "default": "head", "simple-gla": "head", "retnet": "head",
    "lolcats-window_kind=sliding-share_kv=True-slots=3": "head",
    "gla": "channel", "liger": "channel", "hgrn2": "channel", "lawcat": "channel",
    "gated-deltanet": "delta", "deltanet": "delta", "mom": "delta", "ahn": "delta",
}  # fmt: skip
PADDED = ("default", "gla", "gated-deltanet")
IN_PYTORCH = ("kda", "deltaproduct", "rwkv7", "gsa", "gateloop")
TERRACED = "lolcats-window_kind=terraced-share_kv=True"
POINTS = {point.id: point.spec for point in method_points()}
Way = Callable[[Mixer, Inputs], dict[str, Tensor]]


def setting(spec: MixerSpec, device: torch.device) -> tuple[Mixer, Inputs]:
    inputs = random_inputs(tiny_shape(), TIME, 2, torch.float32)
    moved: dict[str, Any] = {name: getattr(inputs, name).to(device) for name in STREAMS}
    return random_mixer(spec, dtype=torch.float32).to(device), replace(inputs, **moved)


def with_gradients(mixer: Mixer, inputs: Inputs) -> dict[str, Tensor]:
    leaves = {name: getattr(inputs, name).clone().requires_grad_() for name in ("q", "k", "v", "hidden")}
    wanted = {**leaves, **dict(mixer.named_parameters())}
    out = mixer(replace(inputs, **leaves))[0]
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).sin().view_as(out)
    grads = torch.autograd.grad((out * weight).sum(), list(wanted.values()), allow_unused=True, materialize_grads=True)
    return {"output": out.detach(), **{f"gradient of {name}": x for name, x in zip(wanted, grads, strict=True)}}


@torch.no_grad()
def prefill_then_decode(mixer: Mixer, inputs: Inputs) -> dict[str, Tensor]:
    out, state = run(mixer, inputs.first(TIME), [TIME - 4, 1, 1, 1])
    return {"output": out, **{f"state {name}": x for name, x in state.items()}}


@torch.no_grad()
def with_pads(mixer: Mixer, inputs: Inputs) -> dict[str, Tensor]:
    mask = torch.ones(2, TIME, dtype=torch.long, device=inputs.q.device)
    mask[0, :5], mask[1, 11:14] = 0, 0
    return {"output": mixer(replace(inputs, mask=mask))[0]}


def both(name: str, way: Way, device: torch.device, used: list[str], backend: Callable[[str], None]) -> list[dict[str, Tensor]]:
    """What PyTorch finds, and what kernels find."""
    mixer, inputs = setting(POINTS[name], device)
    backend("torch")
    expected = way(mixer, inputs)
    assert not used
    backend("fla")
    return [expected, way(mixer, inputs)]


@pytest.mark.parametrize("name", BY_KERNEL)
def test_gradients(name: str, device, bound: float, used: list[str], backend) -> None:
    expected, found = both(name, with_gradients, device, used, backend)
    for label, x in found.items():
        assert_close(x.double(), expected[label].double(), 10 * bound, label)  # sums over all tokens cancel
    assert set(used) == {f"{BY_KERNEL[name]} chunked"}


@pytest.mark.parametrize("name", BY_KERNEL)
def test_prefill_then_decode(name: str, device, bound: float, used: list[str], backend) -> None:
    expected, found = both(name, prefill_then_decode, device, used, backend)
    for label, x in found.items():
        assert_close(x.double(), expected[label].double(), bound, label)
    assert set(used) == {f"{BY_KERNEL[name]} chunked", f"{BY_KERNEL[name]} step"}


@pytest.mark.parametrize("name", PADDED)
def test_pads(name: str, device, bound: float, used: list[str], backend) -> None:
    expected, found = both(name, with_pads, device, used, backend)
    assert_close(found["output"].double(), expected["output"].double(), bound, "output")
    assert set(used) == {f"{BY_KERNEL[name]} chunked"}


@pytest.mark.parametrize("way", [with_gradients, prefill_then_decode])
@pytest.mark.parametrize("name", IN_PYTORCH)
def test_what_has_no_kernel_is_pytorch(name: str, way: Way, device, used: list[str], backend) -> None:
    expected, found = both(name, way, device, used, backend)
    assert all(torch.equal(x, expected[label]) for label, x in found.items())
    assert not used


def test_blocks_enter_in_pytorch(device, bound: float, used: list[str], backend) -> None:
    """A kernel only decays and reads the memory of a terraced window, token by token."""
    expected, found = both(TERRACED, prefill_then_decode, device, used, backend)
    for label, x in found.items():
        assert_close(x.double(), expected[label].double(), bound, label)
    assert set(used) == {"head step"}
