"""Text that the teacher is sampled for: what a slow reference says, the same for any batch, process and interruption."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.tiny import TEXT, environment, tokenizer, write_encoder, write_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from linearize.conversion.convert import convert
from linearize.distillation import teacher_text
from linearize.distillation.loop import make_accelerator
from linearize.distillation.run import distill
from linearize.distillation.sampling import MIN_P, Document, Sampler, drawn_tokens, openings
from linearize.distillation.streaming import Streaming
from linearize.distillation.teacher_text import CAP, batch_rows, teacher_documents, wanted_tokens
from linearize.documents import documents
from linearize.errors import InputError, UnsupportedError, UsageError
from linearize.loading import load
from linearize.methods.base import Stage
from linearize.pipeline import evaluate
from linearize.progress import silent

LENGTH, SEED = 48, 3
SHORT: dict[str, Any] = {"sequence": 32, "tokens": 512, "stage": "attention"}
STAGES = [Stage("attention", 90_000, 1e-2), Stage("lora", 180_000, 1e-4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("source")
    (where / "book.txt").write_text(TEXT, encoding="utf-8")
    given = write_model(where / "tiny")
    return convert(str(given), output=where / "linear", calibration=where / "book.txt", options={"window": 8}).path


@pytest.fixture(scope="module")
def sampler(folder: Path) -> Sampler:
    model, words = load(folder, device="cpu")
    return Sampler(model.double(), words, LENGTH, SEED)


def slowly(document: Document, teacher: LlamaForCausalLM, stops: set[int]) -> list[int]:
    """The document by the definition: one token after another from the source model's whole forward, without a cache."""
    while not document.done:
        with torch.no_grad():
            p = teacher(torch.tensor([document.tokens])).logits[0, -1].softmax(-1).tolist()
        if document.turn < 2:
            for stop in stops:
                p[stop] = 0.0
        p[0] = p[1] = 0.0  # pads and starts
        p = [x if x >= MIN_P * max(p) else 0.0 for x in p]
        aim = float(document.draws[len(document.tokens)]) * sum(p)
        document.take(next(token for token, total in enumerate(accumulate(p)) if total > aim), stops)
    return document.tokens


def test_what_is_sampled_is_the_reference(sampler: Sampler, folder: Path) -> None:
    """The original model's, although the checkpoint's mixers are there and documents are sampled together from a cache."""
    source = json.loads((folder / "config.json").read_text())["linearize"]["source"]["path"]
    teacher = AutoModelForCausalLM.from_pretrained(source).double().eval()
    kinds = len(sampler.openings)
    assert kinds == 2
    for kind in range(kinds):
        indices = [kind + kinds * i for i in range(5)]
        found = [one.tokens for one in sampler.sample(indices)]
        assert found == [slowly(sampler.document(i), teacher, sampler.stops) for i in indices]
        assert [one.tokens for one in sampler.sample(indices[3:5])] == found[3:5], "whatever is sampled beside it"
        assert len({tuple(tokens) for tokens in found}) == len(found)
    other = replace(sampler, seed=SEED + 1).sample([0, 2])
    assert [one.tokens for one in other] != [one.tokens for one in sampler.sample([0, 2])]


def test_tokens_are_drawn_by_their_probability() -> None:
    logits, banned = torch.randn(40, dtype=torch.float64) * 2, torch.zeros(1, 40, dtype=torch.bool)
    banned[0, int(logits.argmax())] = True
    p = logits.masked_fill(banned[0], -torch.inf).softmax(-1)
    p = torch.where(p >= MIN_P * p.max(), p, 0.0)
    assert 5 < int((p > 0).sum()) < 35
    draws = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    drawn = torch.tensor(drawn_tokens(logits.expand(4000, -1), draws, banned.expand(4000, -1)))
    assert torch.allclose(drawn.bincount(minlength=40).double() / 4000, p / p.sum(), atol=1e-3)


def test_how_documents_begin() -> None:
    """By the chat template, by the token that begins documents unless it begins turns too, by a token of the vocabulary."""
    words = tokenizer()
    chat, token = openings(words, LENGTH)
    assert words.decode(chat.tokens) == "<|start|>user\n"
    assert [words.decode(turn) for turn in chat.turns] == ["<|end|>\n<|start|>assistant\n", "<|end|>\n<|start|>user\n"]
    assert token.tokens == ()
    assert not set(token.vocabulary) & set(words.all_special_ids)
    assert openings(words, 4) == [token], "no room for a turn"
    words.chat_template = "{{ raise_exception('never') }}"
    begin, token = openings(words, LENGTH)
    assert begin.tokens == token.tokens == (words.bos_token_id,)
    assert begin.hidden == token.hidden == 1


def test_a_conversation_goes_on_in_turns(sampler: Sampler) -> None:
    """Where the teacher ends a turn the template speaks, and neither turns nor documents are empty."""
    sampler = replace(sampler, length=160)
    sampler.stops |= set(range(60, 70))  # as if its configuration named several
    chat = [one.text(sampler.tokenizer) for one in sampler.sample(range(0, 40, 2))]
    assert all(text.startswith("<|start|>user\n") for text in chat)
    turns = [text.split("<|start|>")[1:] for text in chat]
    assert any(len(said) > 3 for said in turns)
    for said in turns:
        whole = said[:-1]  # the last may be cut in its name
        assert [turn.partition("\n")[0] for turn in whole] == [("user", "assistant")[i % 2] for i in range(len(whole))]
        assert all(turn.partition("\n")[2].removesuffix("<|end|>\n") for turn in whole)
    plain = sampler.sample(range(1, 41, 2))
    assert all(2 < len(one.tokens) <= 160 for one in plain)
    assert any(len(one.tokens) < 160 for one in plain), "some end"
    assert not any("<|end|>" in one.text(sampler.tokenizer) for one in plain)


def test_how_much_is_sampled(folder: Path) -> None:
    assert wanted_tokens(["builtin"], STAGES) == 0
    assert wanted_tokens(["teacher", "builtin"], STAGES) == 200_000, "a tenth is held out"
    assert wanted_tokens(["teacher"], [replace(STAGES[0], tokens=10**9)]) == CAP
    assert wanted_tokens(["teacher:3M"], STAGES) == 3_000_000
    with pytest.raises(UsageError, match="'many' is not a number"):
        wanted_tokens(["teacher:many"], STAGES)
    plan = json.loads((folder / "config.json").read_text())["linearize"]
    assert batch_rows(plan, 1024, 10**6, 4) == 32
    assert batch_rows(plan, 1024, 3000, 4) == 3
    assert batch_rows(plan, 10**6, 10**9, 4) == 3, "two layers, two heads of 8 + 8 numbers: 256 MB a document"


def texts(folder: Path) -> list[str]:
    return documents(str(folder.with_name(f"{folder.name}.teacher")))


def test_a_run_learns_from_it_beside_other_text(folder: Path, tmp_path: Path) -> None:
    made = distill(folder, data=["teacher", str(folder.parent / "book.txt")], output=tmp_path / "out", **SHORT)
    assert made.sampled == tmp_path / "out.teacher"
    assert json.loads((made.path / "recipe.json").read_text())["data"] == ["teacher", str(folder.parent / "book.txt")]
    words = tokenizer()
    assert sum(len(words(text)["input_ids"]) for text in texts(made.path)) > 512
    assert made.stages[0]["tokens"] == 512
    assert evaluate(made.path, data=str(made.sampled), tokens=64, recall=False).rows, "its held-out share measures"


class Stop(Exception):
    pass


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sampling stops in the third file; the list has an entry for each that was begun."""
    real, begun = Sampler.sample, list[int]()

    def sample(self: Sampler, indices: list[int], told: Any) -> list[Document]:
        begun.append(len(indices))
        if len(begun) == 3:
            raise Stop
        return real(self, indices, told)

    monkeypatch.setattr(Sampler, "sample", sample)
    monkeypatch.setattr(teacher_text, "ROWS", 4)
    return begun


def test_it_is_sampled_once(folder: Path, tmp_path: Path, stopping: list[int], sampler: Sampler) -> None:
    """Stopped, it goes on; taken up again nothing is sampled anew; another seed is another text."""
    many: dict[str, Any] = {**SHORT, "data": "teacher:700", "output": tmp_path / "out"}
    with pytest.raises(Stop):
        distill(folder, **many)
    assert not (tmp_path / "out.run").exists()
    first = distill(folder, resume=True, **many)
    files = len(list((tmp_path / "out.teacher").glob("*.jsonl")))
    assert len(stopping) == files + 1 > 4

    def found(name: str, seed: int, tokens: int = 700) -> list[str]:
        options: dict[str, Any] = {"tokens": tokens, "length": 31, "seed": seed, "progress": silent}
        model, words = load(folder, device="cpu")
        return teacher_documents(make_accelerator("cpu"), model, words, folder, tmp_path / name, **options)

    told = texts(first.path)
    assert found("out.teacher", 0) == told
    assert len(stopping) == files + 1
    assert found("apart", 0) == told, "without an interruption"
    more = found("out.teacher", 0, 900)
    assert more[: len(told)] == told != more
    assert not set(found("out.teacher", 1)) & set(told)
    assert not set(texts(first.path)) & set(told), "one text in a folder"


@pytest.mark.parametrize("options", [[], ["--shard"]], ids=["whole", "sharded"])
def test_processes_share_the_work(options: list[str], folder: Path, tmp_path: Path) -> None:
    """Each samples its share; what they learn from is what one process would have."""
    one = distill(folder, data="teacher", output=tmp_path / "one", batch=2, **SHORT)
    command = [sys.executable, "-m", "linearize", "distill", str(folder), "--num-processes", "2", "--data", "teacher", *options]
    command += ["--sequence", "32", "--tokens", "512", "--stage", "attention", "-o", str(tmp_path / "two"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["sampled"] == str(tmp_path / "two.teacher")
    told = texts(one.path)
    assert len(told) > 8
    assert texts(tmp_path / "two")[: len(told)] == told
    assert found["stages"][0]["last_loss"] == pytest.approx(one.stages[0]["last_loss"], rel=1e-3)


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    encoder = convert(str(write_encoder(tmp_path / "bert")), method="hedgehog", output=tmp_path / "encoder").path
    with pytest.raises(UnsupportedError, match="--data teacher is for models that predict the next token"):
        distill(encoder, data="teacher", output=tmp_path / "out")
    with pytest.raises(UsageError, match="in memory one after another: --data teacher"):
        distill(folder, data="teacher", output=tmp_path / "out", streaming=Streaming(1), **SHORT)
    with pytest.raises(InputError, match="only distill samples the teacher's text: teacher") as refused:
        evaluate(folder, data="teacher")
    assert "OUTPUT.teacher" in refused.value.fix
    assert not list(tmp_path.glob("out*"))
