"""Writes the golden checkpoint of the current schema: run it once for each new schema, never for an old one.

python tests/golden/make.py
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from linearize.conversion.convert import convert_model
from linearize.modeling.plans import SCHEMA_VERSION
from linearize.testing import tiny_llama

HERE = Path(__file__).resolve().parent
OPTIONS = {"default": {"window": 4, "sinks": 2}, "liger": {"window": 4}, "lawcat": {"gate_rank": 2}}


def main() -> None:
    for method, options in OPTIONS.items():
        folder = HERE / f"schema-{SCHEMA_VERSION}" / method
        if folder.exists():
            raise SystemExit(f"{folder} exists: a golden checkpoint is never written again")
        torch.manual_seed(0)
        model = convert_model(tiny_llama(), method=method, options=options).eval()
        for name, p in model.named_parameters():
            if ".linearize." in name:
                p.data.add_(0.1 * torch.randn_like(p))
        ids = torch.randint(0, model.config.vocab_size, (2, 23))
        with torch.no_grad():
            logits = model(ids).logits
        model.save_pretrained(folder)
        for path in folder.glob("*.py"):
            path.unlink()  # what must load is the file format; the runtime is the installed one
        save_file({"ids": ids, "logits": logits}, folder / "expected.safetensors")
        shutil.rmtree(folder / "__pycache__", ignore_errors=True)


if __name__ == "__main__":
    main()
