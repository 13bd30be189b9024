"""The config of a GGUF file from its metadata, without loading a tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from linearize.errors import IntegrityError, ResourceError

KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}


def gguf_config(path: Path) -> dict[str, Any]:
    """config.json's keys that a plan needs, read from a GGUF file. IntegrityError if it is not one."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ResourceError("reading GGUF files needs the gguf package", str(path), "pip install 'linearize[gguf]'") from None
    try:
        reader = GGUFReader(str(path))
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.ggml.")}
    except Exception as error:  # the reader fails in many ways on a bad file
        raise IntegrityError(f"not a readable GGUF file ({type(error).__name__})", str(path), "download it again") from None
    arch = fields.get("general.architecture", "")
    config: dict[str, Any] = {"model_type": arch}
    config.update({key: fields[f"{arch}.{name}"] for key, name in KEYS.items() if f"{arch}.{name}" in fields})
    shapes = {tensor.name: [int(n) for n in tensor.shape] for tensor in reader.tensors}
    config["vocab_size"] = shapes.get("token_embd.weight", [0, 0])[-1]
    config["tie_word_embeddings"] = "output.weight" not in shapes
    config["parameters"] = sum(int(tensor.n_elements) for tensor in reader.tensors)
    return config
