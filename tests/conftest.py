"""One thread: tensors here are tiny, and torch's own threads only wait for each other when several runs share a machine."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
