"""Models and checkpoints that are broken, foreign, or not what they seem."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli.tiny import Cli

from . import fault as spoil
from .fault import Fault, trial

CODE = {"model_type": "gpt9", "auto_map": {"AutoConfig": "evil.Config"}}
LAYER = {
    "index": 0, "module": "model.layers.0.self_attn", "cache": "past_key_values", "mixer": {"wings": 2},
    "shape": {"hidden_size": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "value_dim": 8},
}  # fmt: skip
GENERATE = "generate tiny-default --prompt a"

CONFIGS = [
    Fault("no config", 8, "config.json is missing", "convert tiny", spoil.remove("tiny/config.json"), "config.json"),
    Fault("config not JSON", 8, "config.json is not JSON", "convert tiny", spoil.write("tiny/config.json", b"{'a': 1}")),
    Fault("config empty", 8, "config.json is not JSON", "convert tiny", spoil.write("tiny/config.json", b"")),
    Fault("config a list", 8, "config.json is not an object", "convert tiny", spoil.write("tiny/config.json", b"[]")),
    Fault("layers as text", 8, 'must be a positive integer, got "2"', "plan tiny", spoil.config(num_hidden_layers="2")),
    Fault("no layers", 8, "num_hidden_layers must be a positive integer", "plan tiny", spoil.config(num_hidden_layers=0)),
    Fault("layers null", 8, "num_hidden_layers must be a positive integer", "plan tiny", spoil.config(num_hidden_layers=None)),
    Fault("layers unnamed", 8, "num_hidden_layers", "plan tiny", spoil.write("tiny/config.json", b'{"model_type": "llama"}')),
    Fault("heads do not divide", 8, "4 heads do not divide into 3 kv heads", "plan tiny", spoil.config(num_key_value_heads=3)),
    Fault("kv heads as text", 8, "num_key_value_heads", "plan tiny", spoil.config(num_key_value_heads="2")),
    Fault("vocabulary differs", 8, "config.json says 301", "plan tiny", spoil.config(vocab_size=301)),
    Fault("kv heads differ", 8, "k_proj", "plan tiny", spoil.config(num_key_value_heads=1)),
    Fault("a layer without weights", 8, "layers.2", "plan tiny", spoil.config(num_hidden_layers=3)),
    Fault("unsupported", 4, "model_type 'mamba' cannot be converted", "plan tiny", spoil.config(model_type="mamba"), "llama"),
    Fault("unheard of", 4, "model_type 'gpt9'", "plan tiny", spoil.config(model_type="gpt9"), "nearest supported"),
    Fault("quantized", 4, "gptq", "plan tiny", spoil.config(quantization_config={"quant_method": "gptq"}), "unquantized"),
    Fault("wants to run code", 8, "wants to run code", "plan tiny", spoil.config(**CODE), "--trust-remote-code"),
    Fault(
        "longer than max_length", 3, "more than 16 tokens", "convert tiny --method cosformer --set max_length=16", fix="max_length"
    ),
    Fault("no tokenizer", 3, "no tokenizer can be read", "convert tiny -o new", spoil.bare, fix="tokenizer.json"),
    Fault("already linearized", 4, r"already a linearized checkpoint \(default\)", "convert tiny-default", fix="distill"),
]
WEIGHTS = [
    Fault("truncated", 8, r"is truncated: \d+ of \d+ bytes", "convert tiny", spoil.truncate("tiny/model.safetensors"), "download"),
    Fault("a web page", 8, 'is not safetensors.*"<!DOCTYP', "convert tiny", spoil.weights(b"<!DOCTYPE html>" * 9)),
    Fault("empty", 8, "model.safetensors is truncated: 0 bytes", "convert tiny", spoil.weights(b"")),
    Fault("huge header", 8, "header is invalid", "convert tiny", spoil.weights(b"\xff" * 64)),
    Fault("header not JSON", 8, "header is not JSON", "convert tiny", spoil.header(b"abcd")),
    Fault("header a list", 8, "header", "convert tiny", spoil.header(b"[12]")),
    Fault("header without offsets", 8, "header", "convert tiny", spoil.header(b'{"a":{}}')),
    Fault("header with text for offsets", 8, "header", "convert tiny", spoil.header(b'{"a":{"data_offsets":"01"}}')),
    Fault("a hole", 8, "leave a hole or overlap", "convert tiny", spoil.rewrite_header(spoil.shorten_first)),
    Fault("a shard missing", 8, "index names 2 files, 1 present: missing model-00002", "convert tiny", spoil.lose_a_shard),
    Fault("pickle only", 8, "only pickle weights found", "convert tiny", spoil.pickle_only, "safetensors"),
    Fault("none", 8, "no weights found", "convert tiny", spoil.remove("tiny/model.safetensors")),
    Fault("not GGUF", 8, "not a readable GGUF file", "convert x.gguf", spoil.write("x.gguf", b"GGML"), "download"),
]
CHECKPOINTS = [
    Fault("tampered weights", 8, "file 'model.safetensors' hash differs", "inspect tiny-default", spoil.tamper),
    Fault("manifest missing", 8, "linearize.json is missing", GENERATE, spoil.remove("tiny-default/linearize.json")),
    Fault("manifest not JSON", 8, "linearize.json cannot be read", GENERATE, spoil.write("tiny-default/linearize.json", b"{")),
    *(
        Fault(f"manifest with {name}", 8, "a file outside", GENERATE, spoil.edit("tiny-default/linearize.json", files={name: {}}))
        for name in ("../x", "..", ".", "in/../../x", "/etc/hostname")
    ),
    Fault("a link in the folder", 8, "a file outside.*: model.safetensors", GENERATE, spoil.link("tiny-default/model.safetensors")),
    Fault("file missing", 8, "tokenizer.json' is missing", GENERATE, spoil.remove("tiny-default/tokenizer.json")),
    *(
        Fault(f"schema {version}", 8, f"schema {version} is not one that", GENERATE, spoil.plan(schema=version))
        for version in (0, "two", None)
    ),
    Fault("plan a list", 4, "not a linearized checkpoint", GENERATE, spoil.edit("tiny-default/config.json", linearize=[1])),
    Fault("unknown mixer field", 8, "unknown mixer field 'wings'", GENERATE, spoil.plan(layers=[LAYER])),
]  # fmt: skip
VERBS = ("inspect {}", "chat {}", "generate {} --prompt a", "eval {}", "distill {}")
NO_CHECKPOINT = [
    fault
    for verb in VERBS
    for fault in (
        Fault(f"{verb} not there", 2, "no such folder: nowhere", verb.format("nowhere")),
        Fault(f"{verb} not linearized", 4, "not a linearized checkpoint", verb.format("tiny")),
        Fault(
            f"{verb} truncated", 8, "is truncated", verb.format("tiny-default"), spoil.truncate("tiny-default/model.safetensors")
        ),
        Fault(f"{verb} of a newer schema", 8, "schema 99 is newer than", verb.format("tiny-default"), spoil.plan(schema=99)),
    )
]


@pytest.mark.parametrize("fault", [*CONFIGS, *WEIGHTS, *CHECKPOINTS, *NO_CHECKPOINT], ids=lambda fault: fault.name)
def test_refused(fault: Fault, cli: Cli, here: Path) -> None:
    trial(fault, cli)
    assert not (here / "executed").exists()
