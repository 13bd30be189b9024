"""The kernels for attention weights, their cross-entropy and what each token receives: what PyTorch computes in float64."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from called_kernels import POINTS, SHAPE, needs_kernels, recorded, widened
from torch import Tensor

from linearize.distillation.weights_loss import cross_entropy
from linearize.methods.calibration import Calibration
from linearize.methods.slot_fit import attention_inside_and_beyond
from linearize.modeling.spec import SLOT_TARGETS
from linearize.modeling.window import Scores
from linearize.testing import random_inputs
from linearize.testing.laws import EXACT, assert_close

pytestmark = needs_kernels


@pytest.fixture(autouse=True)
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are called."""
    return recorded(monkeypatch)


def found(
    given: list[Tensor], segments: Tensor | None, own: slice, softcap: float | None = None, factor: float = 1.0
) -> list[Tensor]:
    """Loss and gradients by the features of queries and keys."""
    leaves = [x.clone().requires_grad_() for x in given[:2]]
    loss = cross_entropy(*leaves, *given[2:], Scores(0.3, softcap), segments, True, own, factor)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def streams(time: int, memories: int, readers: int, features: int, steep: float) -> list[Tensor]:
    phi_q, phi_k = torch.randn(2, memories, readers, time, features), torch.randn(2, memories, time, features)
    q, k = torch.randn(2, memories * readers, time, 20), torch.randn(2, 2, time, 20)
    return [(steep * phi_q).softmax(-1), (steep * phi_k).softmax(-1), q, k]


@pytest.mark.parametrize("steep", [1.0, 30.0])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("memories, readers", [(2, 3), (4, 1)])
def test_loss_and_gradients(memories: int, readers: int, packed: bool, steep: float) -> None:
    """Steep maps give weights below the floor, which has no gradient."""
    for time, features in itertools.product((2, 16, 33, 150), (16, 48)):
        given = streams(time, memories, readers, features, steep)
        segments = (torch.arange(time) // 23).expand(2, -1) if packed else None
        for own in (slice(0, time), slice(time // 3, time - time // 4)):
            expected = found([x.double() for x in given], segments, own)
            for part, other in zip(found(given, segments, own), expected, strict=True):
                assert_close(part, other, EXACT[torch.float32], f"{time} tokens, {own}")


def test_a_factor() -> None:
    """Of the loss and of its gradients, by the kernel and by PyTorch."""
    given = streams(40, 2, 3, 16, 1.0)
    for own in (given, [x.double() for x in given]):
        plain = found(own, None, slice(0, 40))
        for part, other in zip(found(own, None, slice(0, 40), factor=0.25), plain, strict=True):
            assert_close(part, other / 4, EXACT[torch.float32], str(own[0].dtype))


def test_a_floor_has_no_gradient() -> None:
    phi_q, phi_k, q, k = streams(40, 2, 1, 16, 1.0)
    phi_q, phi_k = torch.zeros_like(phi_q), phi_k * 0
    phi_q[..., 0], phi_k[:, :, ::2, 0] = 1.0, 1.0  # every second weight is none
    given = [phi_q, phi_k, q, k]
    for part, other in zip(found(given, None, slice(0, 40)), found([x.double() for x in given], None, slice(0, 40)), strict=True):
        assert_close(part, other, EXACT[torch.float32], "half of the weights are 0")


def test_gradients_are_given_once() -> None:
    """They are scaled where they are kept: a second time must be an error, not another result."""
    phi_q, phi_k, q, k = streams(20, 2, 1, 16, 1.0)
    loss = 3 * cross_entropy(phi_q.requires_grad_(), phi_k, q, k, Scores(0.3), None, True, slice(0, 20))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_who_computes(called: list[str]) -> None:
    """A teacher that caps its scores and features of a width that no kernel takes are PyTorch's."""
    found(streams(20, 2, 1, 16, 1.0), None, slice(0, 20))
    assert called == ["weights_loss"]
    found(streams(20, 2, 1, 16, 1.0), None, slice(0, 20), 5.0)
    found(streams(20, 2, 1, 12, 1.0), None, slice(0, 20))
    assert called == ["weights_loss"]


@pytest.mark.parametrize("kind", ["sliding", "terraced"])
@pytest.mark.parametrize("window, sinks", [(1, 0), (8, 3), (24, 0), (64, 4)])
@pytest.mark.parametrize("time", [1, 5, 31, 70, 200])
@pytest.mark.parametrize("aim", SLOT_TARGETS)
def test_what_each_token_receives(aim: str, time: int, window: int, sinks: int, kind: str, called: list[str]) -> None:
    """As PyTorch has it in float64; windows that the text does not fill, and steps of q's own."""
    spec = replace(POINTS["lola"], window_kind=kind, window=window, sinks=sinks, slots=3, slot_score="learned", slot_target=aim)
    inputs = random_inputs(SHAPE, time, dtype=torch.float32, softcap=None)
    inputs = replace(inputs, q=inputs.q.transpose(1, 2).contiguous().transpose(1, 2))
    target = torch.zeros(len(inputs.q), time, SHAPE.heads, SHAPE.value_dim)
    found = attention_inside_and_beyond(spec, 2, Calibration(inputs, target))
    assert called == ["attention_received"]
    expected = attention_inside_and_beyond(spec, 2, Calibration(widened(inputs), target.double()))
    for own, other in zip(found, expected, strict=True):
        assert torch.allclose(own, other, rtol=1e-4, atol=1e-9)
    assert called == ["attention_received"]
