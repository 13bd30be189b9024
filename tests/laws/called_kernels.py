"""What the tests of the kernels share: where they can run, which of them were called, and when two parts are the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from linearize.modeling import native, native_hybrid
from linearize.modeling.spec import Shape
from linearize.modeling.stream import Inputs
from linearize.modeling.window import Part
from linearize.testing import method_points
from linearize.testing.laws import BY_HEAD, EXACT, assert_close

POINTS = {point.id: point.spec for point in method_points()}
DEFAULT = POINTS["default"]
SHAPE = Shape(hidden_size=64, heads=4, kv_heads=2, head_dim=16, value_dim=16)
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 150)
needs_kernels = pytest.mark.skipif(native.library() is None, reason="no compiler, no ninja or no AVX2 here")


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are called from here on, by calls that must have them."""
    names: list[str] = []
    library = native.library()

    class Recorded:
        def __getattr__(self, name: str) -> Any:
            names.append(name)
            return getattr(library, name)

    monkeypatch.setenv("LINEARIZE_BACKEND", "native")
    for module in (native, native_hybrid):
        monkeypatch.setattr(module, "library", lambda: None if library is None else Recorded())
    return names


def wide(x: Any) -> Any:
    """The same in float64, which no kernel takes."""
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def widened(inputs: Inputs) -> Inputs:
    names = (*BY_HEAD, "hidden", "cos", "sin")
    return replace(inputs, **{name: wide(getattr(inputs, name)) for name in names})


def same_part(found: Part, expected: Part, what: str) -> None:
    there = expected.denominator > 0
    assert torch.equal(found.denominator > 0, there), what
    assert_close(found.output()[there], expected.output()[there], EXACT[torch.float32], what)
    mass, other = (part.top[there] + part.denominator[there].log() for part in (found, expected))
    assert_close(mass, other, EXACT[torch.float32], f"{what}, mass")


def both_halves(test: Any) -> Any:
    """With the mixers like the default that kernels compute whole: `changes` to its spec, `window` and `sinks`."""
    changes = [{"far_mass": "none"}, {"far_mass": "head"}, {}, {"far_rope": False}, {"feature_dim": 32}, {"kv_dtype": "int8"}]
    sizes = pytest.mark.parametrize("window, sinks", [(1, 0), (7, 4), (64, 4), (70, 0)])
    return sizes(pytest.mark.parametrize("changes", changes, ids=str)(test))
