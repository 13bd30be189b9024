"""Linearized checkpoints load through the Auto classes, whichever import comes first."""

from __future__ import annotations

import subprocess
import sys

import pytest

ASK = """
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from linearize.conversion.architectures import ARCHITECTURES
print(sorted(name for name in ARCHITECTURES if f"linearized_{name}" not in CONFIG_MAPPING))
"""


@pytest.mark.parametrize(
    "imports",
    [
        "from transformers import AutoModelForCausalLM; import linearize",
        "import linearize; from transformers import AutoModelForCausalLM",
        "import linearize; from transformers import LlamaConfig",  # whose docstring imports the Auto classes half-way
        "from transformers import LlamaConfig; import linearize.testing",
    ],
)
def test_every_family_is_known(imports: str) -> None:
    run = subprocess.run([sys.executable, "-c", imports + ASK], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
