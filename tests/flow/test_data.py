"""What distillation learns from: files of several formats, refused with their place when wrong; recall rows mixed in."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from cli.tiny import TEXT, tokenizer, write_model

from linearize.conversion.convert import convert
from linearize.distillation.loop import Schedule
from linearize.distillation.run import distill
from linearize.documents import chat_of, documents
from linearize.errors import InputError, LinearizeError, ResourceError
from linearize.evaluation.recall_rows import TASKS, mixed, recall_row
from linearize.text import pack, split, tokenise

TALK = [{"role": "user", "content": "How many ships?"}, {"role": "assistant", "content": "Seven."}]
Write = Callable[[Path], object]


def lines(*rows: object) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def parquet(path: Path, **columns: list[object]) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def test_every_format_gives_its_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text(lines({"text": "two"}, {"messages": TALK, "id": 3}) + "\n\n")
    parquet(tmp_path / "c.parquet", text=["four", "five"], other=[1, 2])
    parquet(tmp_path / "d.parquet", messages=[TALK])
    words = tokenizer()
    talk = words.apply_chat_template(TALK, tokenize=False)
    assert "<|start|>assistant" in talk
    assert documents(str(tmp_path), chat_of(words)) == ["one", "two", talk, "four", "five", talk]
    assert documents(str(tmp_path / "*.parquet"), chat_of(words)) == ["four", "five", talk]


WRONG: list[tuple[str, Write, str]] = [
    ("a.txt", lambda p: p.write_bytes(b"caf\xe9"), "not UTF-8 .byte 3.: .*a.txt"),
    ("a.txt", lambda p: p.write_text(" \n"), "the text is empty"),
    ("a.jsonl", lambda p: p.write_text(lines({"text": "a"}, {"body": "b"}, {"text": "c"})), "has body; expected.*a.jsonl:2"),
    ("a.jsonl", lambda p: p.write_text('{"text": "a"}\n{"text": \n'), "not JSON.*a.jsonl:2"),
    ("a.jsonl", lambda p: p.write_text(lines([1])), "has list; expected.*:1"),
    ("a.jsonl", lambda p: p.write_text(lines({"messages": [{"role": "user"}]})), "need role and content: .*:1"),
    ("a.jsonl", lambda p: p.write_text(lines({"messages": "hello"})), "need role and content: .*:1"),
    ("a.parquet", lambda p: p.write_text("text"), "not a Parquet file: .*a.parquet"),
    ("a.parquet", lambda p: parquet(p, body=["a"]), "has columns body; expected text or messages: .*a.parquet"),
    ("a.parquet", lambda p: parquet(p, text=["a", None]), "has text; expected.*row 2"),
    ("a.md", lambda p: p.with_suffix(".csv").write_text("a,b"), "no text found"),
]


@pytest.mark.parametrize("name, write, expected", WRONG, ids=[expected for *_, expected in WRONG])
def test_what_cannot_be_read_is_said_with_its_place(name: str, write: Write, expected: str, tmp_path: Path) -> None:
    write(tmp_path / name)
    with pytest.raises(LinearizeError, match=expected) as wrong:
        documents(str(tmp_path / name), chat_of(tokenizer()))
    assert wrong.value.code == 3
    assert wrong.value.fix


def test_a_conversation_needs_a_template(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines({"messages": TALK}))
    words = tokenizer()
    words.chat_template = None
    with pytest.raises(InputError, match=r"no chat template: .*:1"):
        documents(str(tmp_path / "a.jsonl"), chat_of(words))
    words.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(InputError, match=r"refuses it: no system here: .*:1"):
        documents(str(tmp_path / "a.jsonl"), chat_of(words))


class Hub:
    """Stands for the library datasets, whose data sets are lists of rows."""

    def __init__(self, **found: list[dict[str, object]]) -> None:
        self.found = found

    def load_dataset(self, name: str, split: str) -> Hub:
        assert split == "train"
        rows = self.found[name.partition("/")[2]]
        self.rows, self.column_names = rows, list(rows[0])
        return self

    def select_columns(self, names: list[str]) -> list[dict[str, object]]:
        return [{name: row[name] for name in names} for row in self.rows]


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its training split; what is wrong with it is said with its name and row."""
    words = tokenizer()
    hub = Hub(
        plain=[{"text": "one", "id": 1}, {"text": "two", "id": 2}],
        talks=[{"messages": TALK}],
        odd=[{"body": "a"}],
        hole=[{"text": 1}],
    )
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert documents("who/plain", chat_of(words)) == ["one", "two"]
    assert documents("who/talks", chat_of(words)) == [words.apply_chat_template(TALK, tokenize=False)]
    for name, expected in {
        "odd": "has columns body; expected text or messages: who/odd", "hole": "has text; expected.*: who/hole, row 1",
        "nowhere": r"cannot load the data set \(KeyError\): who/nowhere",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=expected):
            documents(f"who/{name}", chat_of(words))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="hub data sets need datasets") as missing:
        documents("who/plain")
    assert "pip install" in missing.value.fix


def test_parquet_without_pyarrow_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet(tmp_path / "a.parquet", text=["a"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ResourceError) as missing:
        documents(str(tmp_path / "a.parquet"))
    assert "pip install" in missing.value.fix


def test_copies_of_a_document_are_on_one_side() -> None:
    for docs, least in (([f"document {i % 40}" for i in range(120)], 1), ([f"document {i % 2}" for i in range(4)], 2)):
        for percent in (1, 10, 99):
            training, held_out = split(docs, percent)
            assert len(training) >= least
            assert held_out
            assert training == [d for d in docs if d not in held_out]
            assert held_out == [d for d in dict.fromkeys(docs) if d not in training]  # each once
    assert split(["".join(["o", "ne"]), "one"], 10) == (["one", "one"], [])


# ---- recall ----


@pytest.fixture(scope="module")
def encoded() -> list[list[int]]:
    return tokenise(tokenizer(), [TEXT[i : i + 200] for i in range(20)])


def said(row: list[int]) -> str:
    return str(tokenizer().decode(row))


@pytest.mark.parametrize("task", TASKS)
def test_a_recall_row_asks_for_what_it_hides(task: str, encoded: list[list[int]]) -> None:
    """The answer stands at the end and, word for word, once before; what it is differs from row to row."""
    rows = [said(recall_row(task, tokenizer(), encoded, 400, str(seed))) for seed in range(8)]
    answers = []
    for row in rows:
        body, question = row.rsplit("\n", 1)
        answer = re.split(r" is called | is | again: ", question)[-1].rstrip(".")
        assert answer in body, question
        answers.append(answer)
    assert len(set(answers)) > 4
    for seed, length in enumerate((300, 401, 1024)):
        assert len(recall_row(task, tokenizer(), encoded, length, str(seed))) == length
    with pytest.raises(InputError, match="needs"):
        recall_row(task, tokenizer(), encoded, 20, "0")


@pytest.mark.parametrize("task", TASKS)
def test_what_is_asked_for_stands_where_it_should(task: str, encoded: list[list[int]]) -> None:
    def places(within: float) -> list[float]:
        rows = [said(recall_row(task, tokenizer(), encoded, 1024, str(seed), within)) for seed in range(12)]
        bodies = [row.rsplit("\n", 1) for row in rows]
        answers = [re.split(r" is called | is | again: ", question)[-1].rstrip(".") for _, question in bodies]
        return [body.index(answer) / len(body) for (body, _), answer in zip(bodies, answers, strict=True)]

    assert max(places(0.1)) < 0.3
    assert max(places(1.0)) > 0.5


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
def test_recall_is_mixed_in_by_share(share: float, encoded: list[list[int]]) -> None:
    """Every epoch has the share, in an order that depends on seed and epoch alone; a row is one text."""
    rows = pack(encoded * 40, 256)
    found = mixed(rows, share, tokenizer(), encoded, 7)
    added = len(found) - len(rows)
    assert added == pytest.approx(share * len(found), abs=1)
    assert torch.equal(found.ids[: len(rows)], rows.ids)
    assert all(torch.equal(positions, torch.arange(256)) for positions in found.positions[len(rows) :])
    assert torch.equal(found.ids, mixed(rows, share, tokenizer(), encoded, 7).ids)
    if added:
        assert not torch.equal(found.ids, mixed(rows, share, tokenizer(), encoded, 8).ids)
        epoch = [i for step in range(len(found)) for i in Schedule(found, 100, 0, 1, 0).indices(step)]
        assert sorted(epoch) == list(range(len(found)))
        halves = [sum(i >= len(rows) for i in part) for part in (epoch[: len(epoch) // 2], epoch[len(epoch) // 2 :])]
        assert min(halves) > 0 or added < 4


def test_distill_learns_from_conversations_and_recall(tmp_path: Path) -> None:
    folder = convert(str(write_model(tmp_path / "tiny")), output=tmp_path / "linear", options={"window": 8}).path
    (tmp_path / "talks.jsonl").write_text(lines(*({"messages": TALK, "n": i} for i in range(8)), {"text": TEXT}))
    made = distill(folder, data=str(tmp_path / "talks.jsonl"), recall=0.3, stage="attention", sequence=256, tokens=1024)
    recipe = json.loads((made.path / "recipe.json").read_text())
    assert (recipe["recall"], recipe["data"]) == (0.3, [str(tmp_path / "talks.jsonl")])
