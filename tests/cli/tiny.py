"""A whole model folder of 200 KB: random Llama, tokenizer with a chat template, text to learn from."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from linearize.cli import run

ROOT = Path(__file__).resolve().parents[2]
TEXT = "The sea is wide and the night is long. Seven ships went out, and six of them came home again. " * 40
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
VOCABULARY = 300


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text has tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|start|>", "<|end|>"]
    made.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<|pad|>", bos_token="<|start|>", eos_token="<|end|>", chat_template=TEMPLATE
    )


def write_model(folder: Path, **changes: object) -> Path:
    """A Llama of two layers, hidden 32, in `folder`."""
    torch.manual_seed(0)
    words = tokenizer()
    config: dict[str, object] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": len(words), "initializer_range": 0.2, "max_position_embeddings": 4096,
        "pad_token_id": words.pad_token_id, "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**{**config, **changes})).save_pretrained(folder)  # type: ignore[arg-type]
    words.save_pretrained(folder)
    return folder


def write_encoder(folder: Path, auto: Any = AutoModelForMaskedLM, model_type: str = "bert") -> Path:
    """A BERT of two layers, hidden 32, for texts of 64 tokens, in `folder`."""
    torch.manual_seed(0)
    words = tokenizer()
    words.add_special_tokens({"cls_token": "<|start|>", "sep_token": "<|end|>", "mask_token": "<|mask|>"})
    config = AutoConfig.for_model(
        model_type, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(words),
        initializer_range=0.2, max_position_embeddings=64, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    auto.from_config(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def tree(folder: Path) -> str:
    """One hash of every file's name and bytes."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        total.update(path.relative_to(folder).as_posix().encode())
        if path.is_file():
            total.update(path.read_bytes())
    return total.hexdigest()


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str


class Cli:
    """Runs `linearize ARGUMENTS` in this process: torch is imported once for all tests."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: object) -> Outcome:
        self.capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = self.capsys.readouterr()
        return Outcome(code, captured.out, captured.err)


def environment(**changes: str) -> dict[str, str]:
    """For a subprocess: this project, no hub, one thread."""
    here = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    return {**os.environ, **here, **changes}


def spawn(*arguments: object, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run `linearize ARGUMENTS` as a process, with these environment variables."""
    command = [sys.executable, "-m", "linearize", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment(**settings), check=False)
