"""Streamed conversion: the same bytes as in memory, nothing half-written, and a 4 GB model inside 2 GB."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.tiny import TEXT, environment, tokenizer
from flow.large import LIMIT, peak_of, write_large
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from linearize import load
from linearize.conversion import plan as plans
from linearize.conversion.architectures import ARCHITECTURES
from linearize.conversion.convert import convert
from linearize.conversion.plan import make_plan
from linearize.conversion.sources import Source
from linearize.conversion.streaming import Route, peak_bytes, route
from linearize.errors import IntegrityError
from linearize.modeling.spec import Shape
from linearize.testing.families import tiny_family

TINY: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "initializer_range": 0.2, "max_position_embeddings": 4096,
}  # fmt: skip
FREE = 12e9
POLL = 0.01  # seconds


def write_source(folder: Path, model_type: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A random model in many small shards, with a tokenizer and a text beside it."""
    words = tokenizer()
    ids = {"pad_token_id": words.pad_token_id, "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**TINY, **ids, **changes}, vocab_size=len(words)))
    model.to(dtype).save_pretrained(folder, max_shard_size="20KB")
    words.save_pretrained(folder)
    (folder.parent / "book.txt").write_text(TEXT)
    assert (folder / "model.safetensors.index.json").exists()
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Every file but the manifest, which tells the time."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "linearize.json"}


CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"tie_word_embeddings": True}, {}),
    ({"tie_word_embeddings": True}, {"method": "gated-deltanet*2,softmax", "start": "published"}),
    ({}, {"method": "performer", "seed": 3}),
    ({"dtype": torch.bfloat16}, {"dtype": "auto", "method": "hedgehog"}),
    ({"dtype": torch.bfloat16}, {"dtype": "float32", "layers": "1-2"}),
    ({"dtype": torch.bfloat16, "tie_word_embeddings": True}, {"dtype": "bfloat16"}),
    ({"model_type": "qwen3"}, {"start": "published"}),
]


def same_bytes(given: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converted on both routes: every file the same but the manifest."""
    chosen = {"device": "cpu", "calibration": tmp_path / "book.txt", **options}
    streamed = convert(str(given), output=tmp_path / "streamed", **chosen)
    assert streamed.plan.route.streamed
    monkeypatch.setattr(plans, "route", lambda *_: Route(False, "to compare", None))
    whole = convert(str(given), output=tmp_path / "whole", **chosen)
    assert not whole.plan.route.streamed
    assert streamed.errors == whole.errors
    assert files(tmp_path / "streamed") == files(tmp_path / "whole")
    assert not list(tmp_path.glob("*.tmp-*"))


@pytest.mark.parametrize("source, options", CASES, ids=str)
def test_same_bytes(source: dict[str, Any], options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same_bytes(write_source(tmp_path / "source", **source), options, tmp_path, monkeypatch)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_same_bytes_of_every_family(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = tokenizer()
    tiny_family(family, vocab_size=len(words)).save_pretrained(tmp_path / "source", max_shard_size="50KB")
    words.save_pretrained(tmp_path / "source")
    (tmp_path / "book.txt").write_text(TEXT)
    method = "default" if ARCHITECTURES[family].causal else "hedgehog"
    same_bytes(tmp_path / "source", {"layers": "all", "method": method}, tmp_path, monkeypatch)


def test_source_tensors_are_kept(tmp_path: Path) -> None:
    """To the bit, and beside them only mixers; the checkpoint loads."""
    given = write_source(tmp_path / "source", tie_word_embeddings=True)
    convert(str(given), output=tmp_path / "out", calibration=tmp_path / "book.txt")
    before = {name: tensor for path in given.glob("*.safetensors") for name, tensor in load_file(path).items()}
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(".linearize." in name for name in after.keys() - before.keys())
    model, _ = load(tmp_path / "out")
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.2.mlp.down_proj.weight", "lm_head.weight"])
def test_not_finite(name: str, tmp_path: Path) -> None:
    given = write_source(tmp_path / "source")
    path = given / json.loads((given / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(path)
    tensors[name][1, 1] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=rf"{name} has non-finite values"):
        convert(str(given), output=tmp_path / "out", calibration=tmp_path / "book.txt")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["book.txt", "source"]


def test_tensor_missing(tmp_path: Path) -> None:
    """transformers alone would fill it with random values and go on."""
    given = write_source(tmp_path / "source")
    path = given / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = given / index["weight_map"].pop("model.norm.weight")
    save_file({k: v for k, v in load_file(shard).items() if k != "model.norm.weight"}, shard, metadata={"format": "pt"})
    path.write_text(json.dumps(index))
    with pytest.raises(IntegrityError, match=r"model.norm.weight is not among the weights"):
        convert(str(given), output=tmp_path / "out", calibration=tmp_path / "book.txt")


def test_peak_does_not_grow_with_depth() -> None:
    """Twice the layers in as many shards: the same peak. Once a shard is full the size of the model no longer counts."""
    shape = Shape(4096, 32, 8, 128, 128)

    def peak(layers: int) -> int:
        return peak_bytes(shape, 14336, [32000 * 4096, *[14336 * 4096, 4096 * 4096] * layers])

    assert peak(32) == peak(64)


def test_peak_of_a_model_on_the_hub() -> None:
    """Nothing is fetched for it; a large model fills a shard."""
    config = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000,
    }  # fmt: skip
    found = route(Source("x/y", "x/y", "hub", None, config), ARCHITECTURES["llama"])
    assert found.streamed
    assert found.peak_bytes is not None
    assert 1e9 <= found.peak_bytes < 4e9


def test_plan_says_so(tmp_path: Path) -> None:
    made = make_plan(str(write_source(tmp_path / "source"))).to_dict()
    assert made["conversion"]["streamed"]
    assert made["conversion"]["peak_bytes"] > 0


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Path]:
    """4.2 GB of random fp32 weights, of which one layer at a time is in memory while they are written."""
    if (free := shutil.disk_usage(tmp_path).free) < FREE:
        pytest.skip(f"needs {FREE / 1e9:.0f} GB of disk, {free / 1e9:.1f} GB are free")
    yield write_large(tmp_path / "large")
    shutil.rmtree(tmp_path)


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_four_gigabytes_in_two(large: Path) -> None:
    """The command in a process that is killed once its resident memory has passed 2 GB; in memory it takes 4.8 GB.

    RLIMIT_AS and RLIMIT_DATA are no measure: they count every byte of a file that is open, whether or not it was ever read.
    """
    (large.parent / "book.txt").write_text(TEXT)
    arguments = ["convert", large, "-o", large.parent / "out", "--calibration", large.parent / "book.txt", "--device", "cpu"]
    command = [sys.executable, "-m", "linearize", *map(str, arguments)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, peak_of(process))
        if peak > LIMIT:
            process.kill()
        time.sleep(POLL)
    assert 0.1e9 < peak < LIMIT
    assert process.returncode == 0
    written = list((large.parent / "out").glob("*.safetensors"))
    assert sum(path.stat().st_size for path in written) > 4e9
    assert len(written) > 1
    print(f"peak {peak / 1e9:.2f} GB")
