"""fla's kernels on this machine: on a GPU as they are, on a CPU by Triton's interpreter, which needs two corrections for fla 0.6.

    pip install -e ".[test,fla]" && TRITON_INTERPRET=1 pytest -m fla tests/fla

Triton reads TRITON_INTERPRET where it is first imported, so it is set outside. The interpreter shows layouts, scales, states
and gradients as the kernels have them; it shows neither speed nor what tensor cores round.
"""

from __future__ import annotations

import builtins
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent
OPS = ("delta_rule", "gated_delta_rule", "gla", "linear_attn", "simple_gla")


def missing() -> str:
    """Why no kernel can run here, or nothing."""
    if find_spec("triton") is None or find_spec("einops") is None or getattr(find_spec("fla"), "origin", None) is None:
        return "flash-linear-attention and triton are not installed: pip install -e '.[fla]'"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "kernels need a GPU, or TRITON_INTERPRET=1"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    own = [item for item in items if FOLDER in item.path.parents]
    reason = missing() if own else ""
    for item in own:
        item.add_marker(pytest.mark.fla)
        for found in (
            "overflow",
            "invalid value",
        ):  # numpy, on what a kernel masks afterwards; the tests see that results are finite
            item.add_marker(pytest.mark.filterwarnings(f"ignore:{found} encountered:RuntimeWarning"))
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


class Index(int):
    """What range() gives inside an interpreted kernel: kernels convert it as the tensor that it is when compiled."""

    def to(self, _: Any) -> Index:
        return self


def interpreted_range(*bounds: Any) -> Iterator[Index]:
    return map(Index, builtins.range(*map(int, bounds)))


@pytest.fixture(scope="session", autouse=True)
def interpreter() -> None:
    """Under the interpreter there is no GPU to time configurations on, and range() gives integers."""
    if missing() or os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime.autotuner import Autotuner

    Autotuner._bench = lambda self, *args, config, **meta: [0.0, 0.0, 0.0]
    for name in OPS:
        importlib.import_module(f"fla.ops.{name}")
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops."):
            vars(module)["range"] = interpreted_range


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


@pytest.fixture(scope="session")
def bound(device: torch.device) -> float:
    """Relative RMSE of float32: tensor cores round its factors to TF32."""
    return 1e-5 if device.type == "cpu" else 5e-3


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda name: monkeypatch.setenv("LINEARIZE_BACKEND", name)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that the test has called so far."""
    from linearize.modeling import backends

    names, run = [], backends.run

    def recorded(name: str, *args: Any, **streams: Any) -> Any:
        names.append(name)
        return run(name, *args, **streams)

    monkeypatch.setattr(backends, "run", recorded)
    return names
