"""What is printed: tables that fit, one JSON object where asked, errors in two lines."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.cells import cell_len

from cli.tiny import Cli
from linearize import methods
from linearize.cli import console, units
from linearize.conversion import convert
from linearize.ranges import span


def test_methods_lists_every_method(cli: Cli) -> None:
    done = cli("methods")
    assert done.code == 0
    assert all(f"\n{name} " in done.out for name in methods.names())


def test_a_method_shows_its_options(cli: Cli) -> None:
    done = cli("methods", "liger")
    for option in methods.get("liger").options():
        assert option["key"] in done.out
        assert option["help"] in done.out


def test_methods_as_json(cli: Cli) -> None:
    listed = json.loads(cli("methods", "--json").out)
    assert [method["name"] for method in listed] == methods.names()
    one = json.loads(cli("methods", "lolcats", "--json").out)
    assert {"key", "type", "default", "help"} == set(one["options"][0])


@pytest.mark.parametrize("verb", [("plan",), ("convert", "--dry-run")], ids=" ".join)
def test_a_plan_is_shown_and_nothing_is_written(
    cli: Cli, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli(verb[0], model, *verb[1:], "--layers", "0", "--method", "hedgehog")
    assert done.code == 0
    rows = [line.split() for line in done.out.splitlines()]
    assert next(row for row in rows if row[:1] == ["0"])[:3] == ["0", "softmax", "hedgehog"]
    assert ["1", "softmax", "kept", "0", "grows"] in rows
    assert next(row for row in rows if row[:1] == ["total"])[:4] == ["total", "1", "of", "2"]
    assert "4,096 tokens" in done.out
    assert "32,768 tokens" in done.out
    assert not list(tmp_path.iterdir())


def test_what_a_plan_says_to_type_writes_that_plan(cli: Cli, model: Path, book: Path, tmp_path: Path) -> None:
    flags = ("--method", "lolcats", "--start", "published", "--dtype", "bfloat16", "--set", "window=4", "--layers", "0")
    words = shlex.split(cli("plan", model, *flags).out.split("to write it: ")[1])
    assert cli(*words[1:], "-o", tmp_path / "made", "--calibration", book).code == 0
    made = json.loads(cli("inspect", tmp_path / "made", "--json").out)
    assert (made["method"], made["options"], made["start"]) == ("lolcats", {"window": "4"}, "published")
    assert [layer["index"] for layer in made["layers"]] == [0]
    assert json.loads((tmp_path / "made" / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"


def test_a_recipe_says_method_and_options(
    cli: Cli, model: Path, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is held out. However they are written, other options are not those of the checkpoint."""
    recipe, seen = tmp_path / "recipe.yaml", list[object]()
    options, learns = '{window: 4, "window@1": 8}', "held_out: 30, sequence: 32, stages: {lora: {tokens: 64}}"
    recipe.write_text(f"{{method: lolcats, options: {options}, {learns}}}")
    ids = convert.calibration_ids
    monkeypatch.setattr(convert, "calibration_ids", lambda *given: seen.append(given[1].held_out) or ids(*given))
    told = json.loads(cli("plan", model, "--recipe", recipe, "--json").out)["estimates"]["tokens"]
    assert {kind: count for kind, count in told.items() if kind != "start"} == {"lora": 64}
    words = shlex.split(cli("plan", model, "--recipe", recipe, "--set", "window=6").out.split("to write it: ")[1])
    assert cli(*words[1:], "-o", tmp_path / "made", "--calibration", book).code == 0
    made = json.loads(cli("inspect", tmp_path / "made", "--json").out)
    assert (made["method"], made["options"]) == ("lolcats", {"window": "6", "window@1": 8})
    said = cli("distill", tmp_path / "made", "--recipe", recipe, "--data", book)
    assert (said.code, "other options than the recipe's" in said.err) == (3, True)
    assert cli("convert", model, "--recipe", recipe, "-o", tmp_path / "own", "--calibration", book).code == 0
    assert seen == [30, 30]
    recipe.write_text(recipe.read_text().replace(options, '{"window@0": "4", window: 8, "window@1": 8}'))
    assert cli("distill", tmp_path / "own", "--recipe", recipe, "--data", book, "-o", tmp_path / "learnt").code == 0


def test_a_plan_as_json(cli: Cli, model: Path) -> None:
    done = cli("plan", model, "--json")
    made = json.loads(done.out)
    assert made["method"] == "default"
    assert made["kept"] == 0
    assert made["state_bytes"] == sum(layer["state_bytes"] for layer in made["layers"])


def test_a_narrow_terminal_loses_nothing(cli: Cli, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    done = cli("plan", model)
    assert max(map(len, done.out.split("\nnothing")[0].splitlines())) <= 60
    assert "…" not in done.out
    assert "32,768 tokens" in done.out
    assert "\x1b" not in done.out


@pytest.mark.parametrize("width", [70, 80, 120])
def test_a_wide_table_keeps_its_words_and_numbers(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    titles = ("student, far memory off", "student, slots off", "window 416 + 4 sinks alone", "student 95%", "prompts")
    columns = [console.Column("recall"), *(console.Column(title, True) for title in titles)]
    row = ["変数-tracking", "100.0%", "5.0%", "10.0%", "51-100", "4"]
    console.Console().table(columns, [row])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split() == row
    assert max(map(cell_len, lines)) <= width
    assert sorted(" ".join(lines[:-1]).split()) == sorted(" ".join(["recall", *titles]).split())


def test_inspect(cli: Cli, converted: Path) -> None:
    done = cli("inspect", converted)
    assert done.code == 0
    assert "hashes match" in done.out
    assert "2 converted: 0-1" in done.out
    found = json.loads(cli("inspect", converted, "--json").out)
    assert found["method"] == "default"
    assert found["files"]["verified"]


def test_inspect_tells_of_layers_that_stay_softmax(cli: Cli, model: Path, converted: Path, book: Path, tmp_path: Path) -> None:
    """They have a cache beside the state, and would have had one before."""
    assert cli("convert", model, "--layers", "0", "--calibration", book, "-o", tmp_path / "half").code == 0
    assert "1 of softmax, whose cache is not in the state" in cli("inspect", tmp_path / "half").out
    half, whole = (json.loads(cli("inspect", folder, "--json").out) for folder in (tmp_path / "half", converted))
    assert (half["softmax_layers"], whole["softmax_layers"]) == (1, 0)
    assert half["kv_bytes"] == whole["kv_bytes"]


def test_convert_names_its_output_by_model_and_method(
    cli: Cli, model: Path, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli("convert", model, "--method", "liger", "--calibration", book)
    assert done.code == 0, done.err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-liger"]
    assert "saved    tiny-liger" in done.out
    assert "linearize distill tiny-liger" in done.out


def test_evaluate(cli: Cli, converted: Path, book: Path) -> None:
    done = cli("eval", converted, "--data", book, "--tokens", "256", "--no-recall", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert {"teacher", "student"} <= {row["name"] for row in found["rows"]}
    assert len(found["layers"]) == 2


def test_evaluation_table(cli: Cli, converted: Path, book: Path) -> None:
    done = cli("eval", converted, "--data", book, "--tokens", "256", "--no-recall")
    assert done.code == 0, done.err
    assert "perplexity" in done.out
    assert "layer error" in done.out


def test_distill(cli: Cli, converted: Path, book: Path, tmp_path: Path) -> None:
    taught = tmp_path / "taught"
    done = cli("distill", converted, "--data", book, "--tokens", "512", "--sequence", "64", "-o", taught, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert [stage["kind"] for stage in found["stages"]] == ["attention", "lora"]
    assert cli("inspect", taught).code == 0


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (94_371_840, "94.4 MB"), (None, "-"), (1e15, "1000 TB")]
)
def test_sizes_are_decimal(count: float | None, text: str) -> None:
    assert units.size(count) == text


def test_spans() -> None:
    assert span([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"


def test_json_holds_no_nan() -> None:
    assert units.plain({"a": float("nan"), "b": [Path("x"), 1, True, None]}) == {"a": None, "b": ["x", 1, True, None]}


def test_progress_in_a_log_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    progress = console.Lines()
    for step in range(101):
        now = float(step)
        progress("attention", step, 100, loss=0.5)
    progress("save", 0, 1)
    progress("save", 1, 1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "attention    0%  loss=0.5"
    assert lines[1] == "attention    5%  eta 1:35  loss=0.5"
    assert lines[-2:] == ["attention  100%  loss=0.5", "save"]
    assert len(lines) == 22


def test_the_demo_shows_each_part_as_it_comes(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    speed = {"tokens_per_second": 5.0, "prefill_tokens_per_second": 69.0}
    row = {"name": "student", "perplexity": 17.5, "ratio": None, "top1": None, "kl": None, "state_bytes": 6_100_000}
    stage = {"kind": "attention", "tokens": 30_720, "first_loss": 0.08, "last_loss": 0.05, "seconds": 415.0}
    group = {"group": "mixers", "parameters": 1_500_000, "dtype": "float32", "lr": 0.01}
    found = {
        "model": "m",
        "method": "default",
        "text": "builtin",
        "tokens": 3069,
        "rows": [row],
        "layers": [],
        "recall": [],
        "notes": ["honest"],
    }

    def demo(tell: Callable[[str, object], None], **_: object) -> dict[str, object]:
        tell("stages", [{**stage, "trained": [group]}])
        tell("evaluation", found)
        tell("question", "Why?")
        for piece in ("Be", "cause."):
            tell("answer", piece)
        tell("stats", {"tokens": 2, "state_bytes": 6_100_000, "kv_bytes": 2_400_000, **speed})
        tell("next", ["linearize chat a", "linearize methods"])
        return {"path": "a"}

    monkeypatch.setattr("linearize.pipeline.demo", demo)
    done = cli("demo")
    assert done.code == 0, done.err
    for line in (
        "attention  30.7 K        0.08  0.05  6:55  mixers 1.5 M float32 lr 0.01",
        "student       17.50      -      -   -  6.1 MB",
        "note: honest",
        ">>> Why?\nBecause.\n2 tok · 5 tok/s · prefill 69 tok/s · state 6.1 MB · KV would be 2.4 MB",
        "next     linearize chat a\n         linearize methods",
    ):
        assert line in done.out
    assert json.loads(cli("demo", "--json").out) == {"path": "a"}
