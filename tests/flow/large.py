"""A model of several GB made on disk, and how much memory a process has held."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import torch
from cli.tiny import tokenizer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

LIMIT = 2e9


def write_large(folder: Path, layers: int = 15) -> Path:
    """Random weights in fp32, of which one layer at a time is in memory while they are written: 0.24 GB each, 0.5 GB beside."""
    words = tokenizer()
    words.save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=4,
        vocab_size=32000, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, dtype="float32",
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    shard = {name: name.split(".")[2] if ".layers." in name else "rest" for name in shapes}
    for one in sorted(set(shard.values())):
        tensors = {name: torch.empty(shapes[name]).normal_(std=0.02) for name in shapes if shard[name] == one}
        save_file(tensors, folder / f"model-{one}.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: f"model-{one}.safetensors" for name, one in shard.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def peak_of(process: subprocess.Popen[bytes]) -> int:
    """VmHWM in bytes: the most memory that was resident at once, Python, torch and mapped pages of files included."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
