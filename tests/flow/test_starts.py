"""Fitting a start: what is said of the output error without making the output, and of slots that are not read again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from linearize.methods.calibration import Calibration
from linearize.methods.starts import SHIFTS, Quadratic, error_of, fit_merge, halves_beside
from linearize.modeling.mixer import Mixer
from linearize.testing import method_points
from linearize.testing.models import random_inputs, randomise, tiny_shape

SLOTS = {"window": 8, "sinks": 2, "slots": 5, "slot_score": "attention", "more_slots": 3, "more_heads": (1,)}


@pytest.fixture(params=[{}, SLOTS, {"far_mass": "head"}], ids=str)
def mixer(request: pytest.FixtureRequest) -> Mixer:
    spec = next(point.spec for point in method_points() if point.id == "default")
    torch.manual_seed(1)
    return randomise(Mixer(replace(spec, **request.param), tiny_shape())).double()


@pytest.fixture
def calibration() -> Calibration:
    inputs = random_inputs(tiny_shape(), 90, 2)
    draw = torch.Generator().manual_seed(3)
    return Calibration(inputs, torch.randn(2, 90, 4, 8, generator=draw, dtype=torch.float64))


@torch.no_grad()
def test_the_error_of_a_share_is_that_of_the_output(mixer: Mixer, calibration: Calibration) -> None:
    halves, mass = mixer.halves(calibration.inputs), mixer.far_mass
    assert mass is not None
    odds, error, bias = mixer.far_odds(halves), Quadratic.of(halves, calibration), mass.bias.data.clone()
    for shift in SHIFTS:
        mass.bias.data.copy_(bias + shift)
        expected = error_of(mixer, halves, calibration).double()
        assert torch.allclose(error(torch.sigmoid(odds + shift)), expected, rtol=1e-5)


@torch.no_grad()
def test_slots_of_a_near_half_that_is_known_are_not_read_again(
    mixer: Mixer, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = list[bool]()
    monkeypatch.setattr(Mixer, "_slots_part", lambda *given, own=Mixer._slots_part: (read.append(True), own(*given))[1])
    whole = mixer.halves(calibration.inputs)
    count = len(read)
    assert bool(count) == bool(mixer.spec.slots)
    found = halves_beside(mixer, calibration, whole.near)
    assert len(read) == count
    assert found.near is whole.near
    assert mixer.ablate is None
    for name in ("read", "mass"):
        assert torch.equal(getattr(found, name), getattr(whole, name))


@torch.no_grad()
def test_a_fit_beside_a_known_near_half_is_the_same(mixer: Mixer, calibration: Calibration) -> None:
    errors, near = fit_merge(mixer, calibration)
    fitted = {name: x.clone() for name, x in mixer.state_dict().items()}
    again, other = fit_merge(mixer, calibration, near)
    assert errors is not None
    assert again is not None
    assert torch.equal(errors, again)
    assert other is near
    assert all(torch.equal(x, fitted[name]) for name, x in mixer.state_dict().items())


def test_parts_of_a_calibration_are_one_object(calibration: Calibration) -> None:
    """So that what is computed of one is computed once; products of whole numbers are exact in whatever order they are summed."""
    inputs = calibration.inputs
    calibration = replace(calibration, inputs=replace(inputs, q=inputs.q.round(), k=inputs.k.round()), _kept={}, _parts={})
    one, other = (calibration.part(slice(1)).first(50) for _ in range(2))
    assert one is other
    assert one.log_mass() is other.log_mass()
    assert torch.equal(one.log_mass(), calibration.log_mass()[:1, :, :50])
    assert calibration.part(slice(-1, None)) is not calibration.part(slice(1))
    assert torch.equal(calibration.part(slice(-1, None)).target, calibration.target[1:])
