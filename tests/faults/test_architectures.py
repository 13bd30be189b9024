"""Models that cannot be converted are refused from their config, with the reason and the nearest supported family."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.test_help import loaded
from cli.tiny import Cli
from transformers import AutoConfig, AutoModelForCausalLM

from linearize.conversion.architectures import ARCHITECTURES
from linearize.conversion.detection import REFUSED, verdict

from . import fault as spoil
from .fault import Fault, trial

LINEAR = ["linear_attention", "full_attention"]
REFUSALS = [
    Fault("encoder-decoder", 4, "encoder-decoder models are not supported", "plan tiny", spoil.config(model_type="t5")),
    Fault("says encoder-decoder", 4, "encoder-decoder", "plan tiny", spoil.config(model_type="new", is_encoder_decoder=True)),
    Fault("vision", 4, "see or hear", "plan tiny", spoil.config(model_type="gemma3", vision_config={}), "gemma3_text"),
    Fault("SSM only", 4, "no softmax attention", "convert tiny", spoil.config(model_type="falcon_mamba")),
    Fault("already linear", 4, "linear or recurrent already", "convert tiny", spoil.config(model_type="qwen3_next"), "qwen3"),
    Fault("says linear", 4, "linear or recurrent already", "convert tiny", spoil.config(model_type="new", layer_types=LINEAR)),
    Fault("not through the interface", 4, "attention interface", "convert tiny", spoil.config(model_type="falcon")),
    Fault("encoder", 4, "bidirectional", "convert tiny", spoil.config(model_type="bert")),
    Fault("unknown to transformers", 4, "transformers cannot build it", "convert tiny", spoil.config(model_type="gpt9")),
]


@pytest.mark.parametrize("fault", REFUSALS, ids=lambda fault: fault.name)
def test_refused(fault: Fault, cli: Cli, here: Path) -> None:
    trial(fault, cli)


def test_an_unknown_family_that_fails_the_self_check(cli: Cli, here: Path) -> None:
    """XGLM's attention is its own, whatever its config says."""
    values = {"d_model": 32, "attention_heads": 4, "num_layers": 2, "ffn_dim": 64, "vocab_size": 300}
    AutoConfig.for_model("xglm", **values).save_pretrained(here / "tiny")
    trial(Fault("", 4, "does not go through transformers' attention interface", "plan tiny", fix="linearize architectures"), cli)


def test_an_unknown_family_goes_the_whole_way(cli: Cli, here: Path) -> None:
    """Planned, converted and used, though no line of the registry names it."""
    assert "arcee" not in ARCHITECTURES
    assert "arcee" not in REFUSED
    config = json.loads((here / "tiny" / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("arcee", **kept)).save_pretrained(here / "tiny")
    assert verdict(json.loads((here / "tiny" / "config.json").read_text())).status == "unknown"
    planned = cli("plan", "tiny")
    assert "self-check" in planned.out, planned.err
    done = cli("convert", "tiny", "-o", "made", "--set", "window=8", "--calibration", "book.txt")
    assert done.code == 0, done.err
    used = cli("generate", "made", "--prompt", "The sea", "--max-tokens", "4", "--json")
    assert used.code == 0, used.err


@pytest.mark.parametrize(
    ("changes", "status"),
    [({}, "supported"), ({"model_type": "gpt_oss"}, "limits"), ({"model_type": "t5"}, "refused"), ({"model_type": "x"}, "unknown")],
)
def test_a_verdict_from_the_config_alone(changes: dict[str, Any], status: str, cli: Cli, here: Path) -> None:
    for path in (here / "tiny").iterdir():
        if path.name != "config.json":
            path.unlink()
    spoil.config(**changes)()
    found = json.loads(cli("architectures", "tiny", "--json").out)
    assert found["status"] == status
    assert (found["nearest"] is not None) == (status in ("refused", "unknown"))


def test_a_verdict_needs_no_torch(here: Path) -> None:
    began = time.monotonic()
    assert not loaded("architectures", "tiny") & {"torch", "transformers"}
    print(f"{time.monotonic() - began:.2f} s")


def test_every_family_is_listed(cli: Cli) -> None:
    listed = json.loads(cli("architectures", "--json").out)
    assert [family["model_type"] for family in listed["supported"]] == list(ARCHITECTURES)
    assert len(listed["supported"]) >= 21
    shown = cli("architectures").out
    assert all(name in shown for name in (*ARCHITECTURES, *REFUSED))
