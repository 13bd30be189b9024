"""A checkpoint loads where only torch and transformers are, and gives the logits that it gives with linearize, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from environments import Environment

from linearize import convert_model
from linearize.conversion.architectures import ARCHITECTURES
from linearize.modeling.modeling_linearized import attentions
from linearize.testing.families import ENCODERS, tiny_family
from linearize.testing.models import randomise
from linearize.testing.points import REPRESENTATIVE

ABSENT = ("linearize", "peft", "accelerate", "rich_click", "datasets", "pytest")
RUN = """
import json
import sys
from pathlib import Path
import torch
import transformers

trust = sys.argv[1] == "trust"
if trust:
    import importlib.util
    assert importlib.util.find_spec("linearize") is None
else:
    import linearize
ids = torch.arange(2, 42).view(2, 20)
mask = torch.ones_like(ids)
mask[1, :5] = 0
for folder in sorted(path for path in Path(sys.argv[2]).iterdir() if path.is_dir()):
    heads = json.loads((folder / "config.json").read_text())["auto_map"]
    auto = "AutoModelForMaskedLM" if "AutoModelForMaskedLM" in heads else "AutoModelForCausalLM"
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=trust).eval()
    assert type(model).__module__.startswith("transformers_modules" if trust else "linearize"), type(model)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        asked = {"max_new_tokens": 8, "do_sample": False}
        tokens = model.generate(ids, attention_mask=mask, **asked) if model.can_generate() else ids
    torch.save({"logits": logits, "tokens": tokens}, Path(sys.argv[3]) / f"{folder.name}.pt")
    if trust:
        model.save_pretrained(Path(sys.argv[3]) / folder.name)
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each family with the default method (encoders with Hedgehog), and of each method on llama."""
    root = tmp_path_factory.mktemp("checkpoints")
    families = [(family, "hedgehog" if family in ENCODERS else "default") for family in ARCHITECTURES]
    for family, method in [*families, *(("llama", method) for method in (*REPRESENTATIVE, "liger-h"))]:
        model = convert_model(tiny_family(family), method=method)
        for attention in attentions(model):
            randomise(attention.linearize)
        model.save_pretrained(root / f"{family}-{method}")
    return root


def test_what_is_absent(bare: Environment) -> None:
    """The environment is what it says: these cannot be imported there."""
    code = "import importlib.util, sys; print(*[n for n in sys.argv[1:] if importlib.util.find_spec(n)])"
    assert bare.run("python", "-c", code, *ABSENT, cwd=bare.root).stdout.split() == []


def test_bit_equal(bare: Environment, installed: Environment, checkpoints: Path, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(RUN, encoding="utf-8")
    with_linearize, without = tmp_path / "with", tmp_path / "without"
    for folder in (with_linearize, without):
        folder.mkdir()
    installed.run("python", script, "import", checkpoints, with_linearize, cwd=tmp_path, LINEARIZE_BACKEND="torch")  # no kernels
    bare.run("python", script, "trust", checkpoints, without, cwd=tmp_path)
    compared = [compare(with_linearize / path.name, path) for path in sorted(without.glob("*.pt"))]
    assert len(compared) == len(list(checkpoints.iterdir())) >= len(ARCHITECTURES) + 4

    # what was loaded so and saved again there loads here, the same
    for path in sorted(without.glob("*.pt")):
        (without / path.name).unlink()
    again = tmp_path / "again"
    again.mkdir()
    installed.run("python", script, "import", without, again, cwd=tmp_path, LINEARIZE_BACKEND="torch")
    for path in sorted(again.glob("*.pt")):
        compare(with_linearize / path.name, path)


def compare(expected: Path, found: Path) -> None:
    first, second = torch.load(expected), torch.load(found)
    assert torch.equal(first["logits"], second["logits"]), found.name
    assert torch.equal(first["tokens"], second["tokens"]), found.name
