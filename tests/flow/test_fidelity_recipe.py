"""recipes/fidelity.py on a small model and short places: the same checkpoint beside itself, held-out documents, sums by hand."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.tiny import ROOT, TEXT, write_model

from linearize import text
from linearize.conversion.convert import convert
from linearize.errors import UsageError
from linearize.loading import load
from linearize.modeling.modeling_linearized import mode
from linearize.pipeline import measured_documents

WORDS = TEXT.split()


@pytest.fixture(scope="module")
def recipe() -> Any:
    spec = importlib.util.spec_from_file_location("fidelity", ROOT / "recipes" / "fidelity.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules["fidelity"] = made  # a dataclass looks there for its own
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of two kinds and three lengths; about half of them are held out at 50%."""
    path = tmp_path_factory.mktemp("text") / "book.jsonl"
    sizes = (750, 300, 120)
    rows = [
        {
            "source": ("sea", "land")[i % 2],
            "text": " ".join(f"{w}{i}" if j % 9 == 0 else w for j, w in enumerate(WORDS[: sizes[i % 3]])),
        }
        for i in range(24)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_one_command_fills_the_table(
    recipe: Any, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"SHORT": 256, "FROM": 256, "LONG": 512, "LONGEST": 1024}.items():
        monkeypatch.setattr(recipe, name, value)
    monkeypatch.setattr(recipe, "DEPTHS", (0.0, 1.0))
    folder = convert(str(write_model(tmp_path / "tiny")), output=tmp_path / "made", options={"window": 8}).path
    flags = ["--data", str(book), "--held-out", "50", "--prompts", "4", "--haystack", "sea", "-o", str(tmp_path / "out.json")]
    flags += ["--tasks", "pass-key:256,pass-key:4096,s-niah-2:256"]
    monkeypatch.setattr(sys, "argv", ["fidelity.py", str(folder), str(folder), str(tmp_path / "tiny"), *flags])
    recipe.main()
    found, said = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    held = text.split([json.loads(x)["text"] for x in book.read_text().splitlines()], 50)[1]
    places = found["text"]
    assert list(places) == ["first 256", "first 256, land", "first 256, sea", "256-512", "512-1,024"]
    assert (
        places["first 256"]["documents"]
        == places["first 256, land"]["documents"] + places["first 256, sea"]["documents"]
        <= len(held)
    )
    assert found["against"]["made"]["512-1,024"] == {"value": 1.0, "interval": [1.0, 1.0]}  # in pairs, itself is itself
    assert found["against"]["made"]["recall"] == {"value": 0.0, "interval": [0.0, 0.0]}
    for title, place in places.items():
        assert place["rows"]["made"] == place["rows"]["student"]
        assert ("student, window off" in place["rows"]) == title.startswith("first")
        assert place["rows"]["tiny"]["perplexity"] == pytest.approx(
            place["rows"]["teacher"]["perplexity"], rel=1e-5
        )  # its own softmax
        assert place["rows"]["teacher"]["ratio"] == 1
    by_hand(found, folder, held)
    assert [(row["task"], row["length"], row["samples"]) for row in found["recall"]] == [
        ("pass-key", 256, 4), ("pass-key", 4096, 4), ("s-niah-2", 256, 4)
    ]  # fmt: skip
    for row in found["recall"]:
        assert row["scores"]["tiny"]["prompts"] == row["scores"]["teacher"]["prompts"]
    assert "| student, window off |" in said
    assert "| pass-key at 4,096, share of the answer |" in said
    assert f"{places['256-512']['rows']['student']['ratio']:.3f} [" in said
    monkeypatch.setattr(sys, "argv", ["fidelity.py", str(folder), *flags, "--parts", "text", "--beyond", "far"])
    recipe.main()
    late = json.loads((tmp_path / "out.json").read_text())["text"]["512-1,024"]["rows"]
    assert late.keys() == places["512-1,024"]["rows"].keys() - {"made", "tiny"} | {"student, far memory off"}
    assert late["student, far memory off"] != late["student"] == places["512-1,024"]["rows"]["student"]
    monkeypatch.setattr(sys, "argv", ["fidelity.py", str(folder), *flags, "--parts", "text", "--few"])
    recipe.main()
    few = json.loads((tmp_path / "out.json").read_text())
    assert few["names"] == ["teacher", "student"]
    assert few["text"]["512-1,024"]["rows"]["student"] == places["512-1,024"]["rows"]["student"]


WRONG = [("--tasks", x) for x in ("pass-key", "pass-key:far", "passkey:256")] + [("--beyond", x) for x in ("sinks", "far slots")]


@pytest.mark.parametrize(("flag", "said"), WRONG)
def test_what_cannot_be_asked(
    recipe: Any, flag: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fidelity.py", "made", flag, said])
    with pytest.raises(SystemExit, match="2"):
        recipe.main()
    assert f"argument {flag}" in capsys.readouterr().err


def by_hand(found: dict[str, Any], folder: Path, held: list[str]) -> None:
    """Losses of whole forward passes over the held-out documents that are long enough."""
    model, tokenizer = load(folder)
    encoded = [ids[:1024] for ids in text.tokenise(tokenizer, held) if len(ids) >= 1024]
    losses: dict[str, list[list[float]]] = {"student": [], "teacher": []}
    for ids in encoded:
        row = torch.tensor([ids])
        with torch.no_grad():
            own = model(row, use_cache=False).logits[0].log_softmax(-1)
            with mode(model, "teacher"):
                teacher = model(row, use_cache=False).logits[0].log_softmax(-1)
        for name, logits in (("student", own), ("teacher", teacher)):
            losses[name].append((-logits[:-1].gather(1, row[0, 1:, None])[:, 0]).tolist())

    def mean(name: str, first: int, last: int) -> float:
        every = [x for row in losses[name] for x in row[first - 1 : last - 1]]
        return sum(every) / len(every)

    late = math.exp(mean("student", 512, 1024))
    assert found["text"]["512-1,024"]["documents"] == min(len(encoded), 8)
    assert found["text"]["512-1,024"]["rows"]["student"]["perplexity"] == pytest.approx(late, rel=1e-4)
    grown = mean("student", 512, 1024) - mean("teacher", 512, 1024) - mean("student", 256, 512) + mean("teacher", 256, 512)
    told = found["growth"]["student"]
    assert told["value"] == pytest.approx(math.exp(grown), rel=1e-4)
    assert told["interval"][0] <= told["value"] <= told["interval"][1]


def test_what_was_trained_on_is_not_measured() -> None:
    docs = [f"document {i}" for i in range(400)]
    stage = {"kind": "attention", "tokens": 8, "data": ["book.jsonl"], "held_out": 20}
    for plan, asked, share in (({"stages": []}, None, 10), ({"stages": [stage]}, None, 20), ({"stages": [stage]}, 10, 10)):
        found, _ = measured_documents(plan, "book.jsonl", docs, asked)
        assert found == text.split(docs, share)[1]
        assert measured_documents(plan, "book.jsonl", [*docs, *docs[:200]], asked)[0] == found  # each once
    with pytest.raises(UsageError, match="held out 20%"):
        measured_documents({"stages": [stage]}, "book.jsonl", docs, 30)
    assert measured_documents({"stages": [stage]}, "other.jsonl", [*docs, docs[0]], 100)[0] == docs
