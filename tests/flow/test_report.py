"""The page, the model card and tasks: nothing is fetched, nothing of the user's is lost, figures are those measured."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli.tiny import TEXT, Cli, write_model

from linearize.conversion.convert import convert
from linearize.errors import InputError, ResourceError
from linearize.evaluation import plots
from linearize.evaluation.card import BEGIN, END, number, spread, update_card
from linearize.evaluation.plots import need_plots
from linearize.evaluation.report import Entry, render
from linearize.loading import load

QUICK = ("--tokens", "1500", "--recall-tasks", "pass-key,mqar", "--recall-lengths", "256,512")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{i} {TEXT[:3000]}"}) for i in range(20)))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    return convert(str(write_model(root / "tiny")), output=root / "made", options={"window": 8}).path


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys)


def references(page: str) -> list[str]:
    """Whatever a browser could fetch, and every address."""
    return re.findall(r"https?:|//\w+\.|<script|<link|<iframe|<img|@import|url\((?!#)|\ssrc=|href=\"(?!#)", page)


def test_report_and_comparison(cli: Cli, folder: Path, text: Path, tmp_path: Path) -> None:
    """Measured, written, loaded again; what the user wrote in the card stays, and the figures are those of the JSON."""
    card = folder / "README.md"
    card.write_text("---\nlicense: mit  # mine\ntags: [sea]\n---\n# My ships\n\nMy words.\n", encoding="utf-8")
    done = cli("report", folder, "--data", text, *QUICK, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)["evaluations"][0]
    saved = json.loads((folder / "evaluation.json").read_text())
    assert saved["rows"] == found["rows"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert references(page) == []
    assert page.count("<svg") >= 8
    student = next(row for row in found["rows"] if row["name"] == "student")
    assert f"{student['perplexity']:.2f}" in page
    words = card.read_text(encoding="utf-8")
    assert words.startswith("---\nlicense: mit  # mine\ntags: [sea]\n")
    assert "# My ships\n\nMy words.\n" in words
    assert f"{student['perplexity']:.2f}" in words.split(BEGIN)[1]
    front = yaml.safe_load(words.split("---\n")[1])
    assert (front["license"], front["tags"], front["pipeline_tag"]) == ("mit", ["sea"], "text-generation")
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == pytest.approx(student["perplexity"], abs=1e-3)
    load(folder)  # the edited card does not make it a damaged checkpoint
    before = (folder / "evaluation.json").stat().st_mtime_ns
    done = cli("report", "--compare", folder, folder, "-o", tmp_path / "both.html")
    assert done.code == 0, done.err
    again = cli("report", "--compare", folder, folder, "-o", tmp_path / "both.html")  # a page of ours gives way
    assert again.code == 0, again.err
    assert cli("report", "--compare", folder, folder).code == 0
    assert (folder / "comparison.html").is_file()
    assert (folder / "report.html").read_text(encoding="utf-8") == page
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    measured = json.loads((other / "evaluation.json").read_text())
    measured["asked"]["tokens"] *= 2
    (other / "evaluation.json").write_text(json.dumps(measured))
    done = cli("report", "--compare", folder, other, "-o", tmp_path / "unlike.html")
    assert done.code == 2, done.err
    assert "measured with" in done.err
    assert not (tmp_path / "unlike.html").exists()
    assert (folder / "evaluation.json").stat().st_mtime_ns == before  # measured once
    assert references((tmp_path / "both.html").read_text(encoding="utf-8")) == []
    assert cli("report", folder, folder).code == 2


def evaluation(**changes: Any) -> dict[str, Any]:
    row = {"name": "student", "perplexity": 12.5, "ratio": None, "top1": None, "kl": None, "state_bytes": 10}
    empty: dict[str, Any] = {
        "positions": [],
        "recall": [],
        "recall_by_length": [],
        "samples": [],
        "speed": {},
        "tasks": {},
        "layers": [],
    }
    facts = {"model": "m", "method": "default", "text": "t", "tokens": 1, "documents": 1, "environment": {}, "notes": []}
    return {**facts, **empty, "rows": [row], **changes}


CURVES = {
    "teacher": [(256, 2.0), (512, 1.0)],
    "student": [(256, 2.0 + math.log(1.5)), (512, 1.0)],
    "student, window off": [(256, 9.0), (512, 9.0)],
    "student, slots off": [],
}


def drawn(monkeypatch: pytest.MonkeyPatch, over: str) -> tuple[str, dict[str, Any]]:
    """The plot by position, and its lines."""
    found: dict[str, Any] = {}
    real = plots.Figure.lines
    monkeypatch.setattr(plots.Figure, "lines", lambda self, curves: (found.update(curves), real(self, curves))[1])
    return plots.positions("By position", CURVES, over), found


def test_a_model_that_is_far_off_flattens_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    svg, lines = drawn(monkeypatch, "")
    assert list(lines) == ["teacher", "student"]
    assert lines["teacher"] == ([256, 512], pytest.approx([math.exp(2), math.e]))
    assert "not drawn, far worse: student, window off" in svg


def test_names_of_many_that_are_far_off_stay_inside_the_plot() -> None:
    worse = {f"student, without part {i} of it": [(256, 9.0), (512, 9.0)] for i in range(5)}
    svg = plots.positions("By position", {**CURVES, **worse})
    said = [line.strip() for line in re.findall(r">([^<>]+)</t", svg)]
    assert max(map(len, said)) <= 60
    assert all(name in " ".join(said) for name in worse)


def test_a_large_figure_has_no_decimals() -> None:
    assert (number(12.3456, 2), number(-12345.6, 2), number(None, 2)) == ("12.35", "-12346", "-")
    assert spread((0.5, 4321.09)) == " [0.500, 4321]"


def test_ratios_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    svg, lines = drawn(monkeypatch, "teacher")
    assert lines == {"student": ([256, 512], pytest.approx([1.5, 1.0]))}
    assert "perplexity over teacher" in svg
    assert plots.positions("By position", {"student": CURVES["student"]}, "teacher") == ""


def test_a_card_written_twice_is_written_once(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("Mine above.\n", encoding="utf-8")
    update_card(tmp_path, evaluation(), "base")
    once = (tmp_path / "README.md").read_text()
    update_card(tmp_path, evaluation(), "base")
    assert (tmp_path / "README.md").read_text() == once
    (tmp_path / "README.md").write_text(once + "Mine below.\n")
    update_card(tmp_path, evaluation(notes=["new"]), "base")
    words = (tmp_path / "README.md").read_text()
    assert words.count(BEGIN) == words.count(END) == 1
    assert "- new\n" in words
    assert "Mine above.\n" in words
    assert words.endswith("Mine below.\n")


@pytest.mark.parametrize("spoiled", [b"\xff\xfe", b"---\na: [\n---\nx\n", b"---\n- a\n---\n"])
def test_a_card_that_cannot_be_read_is_left_alone(tmp_path: Path, spoiled: bytes) -> None:
    (tmp_path / "README.md").write_bytes(spoiled)
    with pytest.raises(InputError):
        update_card(tmp_path, evaluation(), "base")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [spoiled]


def test_what_a_model_says_is_text_not_markup() -> None:
    said = "<script>alert(1)</script>"
    found = evaluation(samples=[{"prompt": said, "answers": {"student": said}}], notes=[said], model=said)
    assert "<script" not in render([Entry(said, found)])


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ResourceError, match="matplotlib"):
        need_plots()


@pytest.mark.exhaustive
def test_a_task_of_ones_own(cli: Cli, folder: Path, text: Path, tmp_path: Path) -> None:
    """lm-evaluation-harness on a file, without a hub: accuracy is that of our own likelihoods, letters add up to the examples."""
    pytest.importorskip("lm_eval")
    rows = [{"q": f"{n} ships went out.", "a": ["six", "seven", "none"], "right": n % 3} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "ships.yaml").write_text(
        f"task: ships\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{a}}'\ndoc_to_target: right\n"
        "metric_list:\n  - metric: acc\n"
    )
    quiet = ("--no-recall", "--no-speed", "--no-samples", "--tokens", "256")
    done = cli("eval", folder, "--data", text, *quiet, "--tasks", "ships", "--task-folder", tmp_path, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)["tasks"]["ships"]
    assert found["examples"] == 6
    assert found["right"] == {"A": 2, "B": 2, "C": 2}
    model, tokenizer = load(folder)
    chosen = []
    for row in rows:
        scores = []
        for answer in row["a"]:  # type: ignore[attr-defined]
            start, whole = (tokenizer(x)["input_ids"] for x in (row["q"], f"{row['q']} {answer}"))
            with torch.no_grad():
                logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(float(logits[i - 1, whole[i]]) for i in range(len(start), len(whole))))
        chosen.append(scores.index(max(scores)))
    assert found["letters"]["student"] == {"ABC"[i]: chosen.count(i) for i in sorted(set(chosen))}
    right = sum(i == row["right"] for i, row in zip(chosen, rows, strict=True))
    assert found["metrics"]["student"]["acc"] == pytest.approx(right / 6)
    assert sum(found["letters"]["teacher"].values()) == 6
    assert cli("eval", folder, "--data", text, *quiet, "--tasks", "no-such-task").code == 3
