"""Encoders through every verb: converted, taught in both stages, inspected; refused where there is no next token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.tiny import TEXT, write_encoder
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from linearize.cli import run
from linearize.conversion.convert import Converted, convert
from linearize.distillation.run import distill
from linearize.documents import documents
from linearize.errors import UnsupportedError
from linearize.text import framed, tokenise

SHORT: dict[str, Any] = {"sequence": 64, "tokens": 64 * 48}


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.jsonl"
    path.write_text("\n".join(json.dumps({"text": TEXT[i : i + 300 + 17 * i]}) for i in range(30)), encoding="utf-8")
    return path


def converted(folder: Path, book: Path, method: str = "hedgehog", **source: Any) -> Converted:
    return convert(str(write_encoder(folder / "tiny", **source)), method=method, output=folder / method, calibration=book)


def rows(folder: Path, book: Path) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return framed(tokenizer, tokenise(tokenizer, documents(str(book))), 48).ids


@torch.no_grad()
def guessing(model: Any, ids: Tensor, teacher: Any) -> float:
    """Mean loss at every seventh token, which is hidden: against the token, or against the teacher's guess."""
    hidden = torch.zeros_like(ids, dtype=torch.bool)
    hidden[:, 3::7] = True
    given = ids.masked_fill(hidden, model.config.vocab_size - 1)
    logits = model.eval()(given).logits[hidden].log_softmax(-1)
    if teacher is None:
        return float(cross_entropy(logits, ids[hidden]))
    return float(kl_div(logits, teacher.eval()(given).logits[hidden].log_softmax(-1), log_target=True, reduction="batchmean"))


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
@pytest.mark.parametrize("method", ["hedgehog", "t2r", "linear-transformer"])
def test_taught_in_every_stage(model_type: str, method: str, book: Path, tmp_path: Path) -> None:
    """Attention transfer lowers its loss; LoRA brings hidden tokens nearer to what they are, or to what the teacher says."""
    made = converted(tmp_path, book, method, model_type=model_type)
    taught = distill(made.path, data=str(book), **SHORT)
    first, last = taught.stages[0], taught.stages[-1]
    assert last["kind"] == "lora"
    assert first["kind"] == "lora" or first["last_loss"] < first["first_loss"]
    folders = (tmp_path / name for name in ("tiny", method, f"{method}-distilled"))
    teacher, before, after = (AutoModelForMaskedLM.from_pretrained(folder) for folder in folders)
    target = teacher if last["loss"] == "kl" else None
    ids = rows(tmp_path / "tiny", book)
    assert guessing(after, ids, target) < guessing(before, ids, target)
    assert "AutoModelForMaskedLM" in (taught.path / "README.md").read_text()


def test_a_classifier_learns_attention_alone(book: Path, tmp_path: Path) -> None:
    made = converted(tmp_path, book, auto=AutoModelForSequenceClassification)
    assert isinstance(AutoModelForSequenceClassification.from_pretrained(made.path).config.linearize, dict)
    taught = distill(made.path, data=str(book), stage="attention", **SHORT)
    assert taught.stages[0]["last_loss"] < taught.stages[0]["first_loss"]
    with pytest.raises(UnsupportedError, match="does not"):
        distill(made.path, data=str(book), output=tmp_path / "no", **SHORT)
    assert not (tmp_path / "no").exists()


def test_rows_are_framed(book: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(write_encoder(tmp_path))
    found = framed(tokenizer, [list(range(10, 40)), [7, 8]], 12)
    assert found.ids.tolist() == [[tokenizer.cls_token_id, *range(i, i + 10), tokenizer.sep_token_id] for i in (10, 20, 30)]
    assert found.positions.tolist() == [list(range(12))] * 3
    assert found.mask_token == tokenizer.mask_token_id


def test_the_command_line(book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(converted(tmp_path, book).path)
    for verb in (["generate", "--prompt", "x"], ["generate", "--chat", "--prompt", "x"], ["chat"], ["eval"]):
        capsys.readouterr()
        assert run([verb[0], folder, *verb[1:]]) == 4
        error = capsys.readouterr().err
        assert "predict the next token, and this is an encoder" in error
        assert "fix: " in error
    assert run(["plan", str(tmp_path / "tiny"), "-m", "hedgehog", "--layers", "0"]) == 0
    planned = capsys.readouterr().out
    assert "KV" not in planned
    assert "grows" not in planned
    assert run(["convert", str(tmp_path / "tiny"), "-m", "hedgehog", "-o", str(tmp_path / "two"), "--calibration", str(book)]) == 0
    assert "linearize chat" not in capsys.readouterr().out
    assert run(["inspect", folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state_bytes"] == 0
    assert run(["inspect", folder]) == 0
    assert "it is an encoder" in capsys.readouterr().out
