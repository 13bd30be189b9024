"""A checkpoint exported for fla is fla's own Gated DeltaNet and computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli.tiny import VOCABULARY, tokenizer
from transformers import AutoModelForCausalLM

from linearize.conversion.convert import convert_model, save
from linearize.conversion.export import export
from linearize.modeling.modeling_linearized import attentions
from linearize.testing import randomise
from linearize.testing.families import tiny_family
from linearize.testing.laws import deviation


@pytest.mark.parametrize(
    ("family", "options", "changes"),
    [
        ("qwen3", {}, {"rms_norm_eps": 1e-3}),
        ("qwen3", {"negative": True, "share_kv": True, "conv": 3}, {"tie_word_embeddings": True}),
        ("llama", {}, {"attention_bias": False}),
    ],
)
def test_export(family: str, options: dict[str, object], changes: dict[str, object], tmp_path: Path, device: torch.device) -> None:
    base = tiny_family(family, vocab_size=VOCABULARY, num_hidden_layers=2, **changes)
    calibration = torch.randint(0, VOCABULARY, (2, 32))
    ours = convert_model(base, method="gated-deltanet", options={"native": True, **options}, calibration=calibration).eval()
    for attention in attentions(ours):
        randomise(attention.linearize)
    save(ours, tokenizer(), tmp_path / "source")
    made = export(tmp_path / "source", to="fla", output=tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(made.path).eval().to(device)
    assert type(theirs).__module__ == "fla.models.gated_deltanet.modeling_gated_deltanet"
    for length in (9, 80):  # fla takes one kernel up to 64 tokens, another beyond
        ids = torch.randint(3, VOCABULARY, (1, length))
        with torch.no_grad():
            assert deviation(theirs(ids.to(device), use_cache=False).logits.cpu(), ours(ids).logits) < 1e-4
