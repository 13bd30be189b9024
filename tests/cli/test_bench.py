"""Every benchmark on a tiny model: the form of its table and of its JSON, and what it refuses. No time is held against another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.tiny import Cli, write_encoder
from linearize.benchmarks import llama_cpp
from linearize.cli import benched, run

SPREAD = {"median": float, "low": float, "high": float, "runs": int}
BOUND = {"matmul": float, "memory": float, "calls": float, "by": str}
WORK = {"flops": float, "calls": int, "nbytes": float}
MACHINE = {"dtype": str, "threads": int, "matmul": float, "read": float, "calls": float}
ROW = {"name": str, "tokens": int, "seconds": SPREAD, "tokens_per_second": float, "work": WORK, "bound": BOUND}
HEAD = {"benchmark": str, "model": str, "method": str, "settings": dict, "environment": dict, "machine": MACHINE}
PEAK = {"weights": int, "loaded": int, "loading_counts": bool, "peak": int, "above_weights": int}
LONG = {**PEAK, "tokens": int, "chunk": int, "state": int}
PROFILE = {
    "seconds": float, "groups": [{"group": str, "seconds": float, "share": float}],
    "operators": [{"name": str, "calls": int, "seconds": float, "group": str, "share": float}],
}  # fmt: skip
BY_LENGTH = {"seconds_a_token": {"16": float, "32": float}, "largest_over_smallest": float}

COMMANDS: dict[str, tuple[str, ...]] = {
    "prefill": ("--lengths", "16,32", "--repeats", "2", "--long", "64", "--chunk", "32"),
    "decode": ("--contexts", "4,16", "--flat", "8,32", "--steps", "2"),
    "batch": ("--sizes", "1,2", "--context", "16", "--steps", "2"),
    "memory": ("--tokens", "50,200", "--turn", "16"),
    "distill": ("--sequence", "32", "--lengths", "16,32", "--repeats", "1"),
    "load": ("--repeats", "1",),
}  # fmt: skip
SCHEMAS: dict[str, dict[str, Any]] = {
    "prefill": {
        **HEAD, "rows": [{**ROW, "length": int}], "long": LONG, "student_ahead_from": (float, type(None)),
        "ratios": [{"length": int, "teacher_over_student": float, "student_over_floor": float}],
    },
    "decode": {
        **HEAD, "rows": [{**ROW, "context": int, "cache_bytes": int}],
        "ratios": [
            {
                "context": int, "best_student": str, "best_teacher": str,
                "over_student": {"teacher": float, "teacher, static cache": float},
            }
        ],
        "flat": {"name": str, "seconds": {"8": SPREAD, "32": SPREAD}, "largest_over_smallest": float},
    },
    "batch": {
        **HEAD, "rows": [{**ROW, "sequences": int, "context": int, "kv_bytes": int, "cache_bytes": int}],
        "ratios": [{"sequences": int, "teacher_over_student": float}],
        "memory": {
            "machine": int, "held": int, "weights": int, "state_a_sequence": float, "kv_a_sequence": int,
            "sequences_of_states": int, "sequences_of_kv": int,
        },
    },
    "memory": {
        "benchmark": str, "model": str, "method": str, "settings": dict, "last_over_first": float,
        "rows": [{**PEAK, "tokens": int, "turns": int}],
        "process": {"weights": int, "loaded": int, "loading_counts": bool, "state": int, "kv": int},
    },
    "distill": {
        **HEAD, "rows": [{**ROW, "length": int}], "profiles": {"attention": PROFILE, "lora": PROFILE},
        "ratios": [{"stage": str, "length": int, "over": str, "throughput": dict}],
        "by_length": {"student": BY_LENGTH, "teacher": BY_LENGTH},
        "peak": {"sequence": int, "ratio": float, "attention": PEAK, "teacher": PEAK},
    },
    "load": {
        "benchmark": str, "model": str, "method": str, "settings": dict, "environment": dict,
        "rows": [{"name": str, "seconds": SPREAD}], "over": str, "converted_over_original": float,
    },
}  # fmt: skip


def conforms(value: Any, schema: Any, where: str = "found") -> None:
    """The same keys, and values of those types; a float may be whole."""
    if isinstance(schema, dict):
        assert set(value) == set(schema), where
        for key, inner in schema.items():
            conforms(value[key], inner, f"{where}.{key}")
    elif isinstance(schema, list):
        assert value, where
        for item in value:
            conforms(item, schema[0], f"{where}[]")
    else:
        types = schema if isinstance(schema, tuple) else (schema,)
        assert isinstance(value, (*types, int) if float in types else types), where


@pytest.fixture(scope="module")
def found(converted: Path, capfd_module: Any) -> dict[str, dict[str, Any]]:
    """What each benchmark prints with --json."""
    made = {}
    for name, flags in COMMANDS.items():
        assert run(["bench", name, str(converted), *flags, "--device", "cpu", "--json"]) == 0, capfd_module()
        made[name] = json.loads(capfd_module())
    return made


@pytest.fixture(scope="module")
def capfd_module() -> Any:
    """What was printed since the last call, in a fixture that outlives a test."""
    import contextlib
    import io

    stream = io.StringIO()

    def read() -> str:
        text = stream.getvalue()
        stream.seek(0)
        stream.truncate()
        return text

    with contextlib.redirect_stdout(stream):
        yield read


@pytest.mark.parametrize("name", COMMANDS)
def test_json(found: dict[str, dict[str, Any]], name: str) -> None:
    conforms(found[name], SCHEMAS[name])
    assert found[name]["benchmark"] == name
    for one in found[name]["rows"]:
        if "seconds" in one:
            assert 0 < one["seconds"]["low"] <= one["seconds"]["median"] <= one["seconds"]["high"]
        if "bound" in one:
            assert one["tokens_per_second"] == pytest.approx(one["tokens"] / one["seconds"]["median"])


def test_what_the_rows_are(found: dict[str, dict[str, Any]]) -> None:
    names = {name: list(dict.fromkeys(row["name"] for row in found[name]["rows"])) for name in COMMANDS if name != "memory"}
    assert names["prefill"] == ["student", "teacher", "floor"]
    assert names["decode"] == ["student", "teacher", "teacher, static cache"]
    assert names["batch"] == ["student", "teacher"]
    stages = ["attention", "attention, packed", "teacher forward", "lora", "lora, unconverted"]
    assert names["distill"] == [*stages, "student, forward and backward", "teacher, forward and backward"]
    assert names["load"] == [
        "converted", "the original", "linearize --help", "linearize inspect", "linearize inspect --no-verify"
    ]  # fmt: skip
    assert [row["turns"] < row["tokens"] for row in found["memory"]["rows"]] == [True, True]
    assert found["memory"]["rows"][1]["tokens"] >= 200 > found["memory"]["rows"][0]["tokens"] >= 50


def test_ratios_are_those_of_the_rows(found: dict[str, dict[str, Any]]) -> None:
    prefill, decode, distill, load = (found[name] for name in ("prefill", "decode", "distill", "load"))
    taken = {(row["name"], row["length"]): row["seconds"]["median"] for row in prefill["rows"]}
    for r in prefill["ratios"]:
        assert r["teacher_over_student"] == pytest.approx(taken["teacher", r["length"]] / taken["student", r["length"]])
        assert r["student_over_floor"] == pytest.approx(taken["student", r["length"]] / taken["floor", r["length"]])
    taken = {(row["name"], row["context"]): row["seconds"]["median"] for row in decode["rows"]}
    for r in decode["ratios"]:
        assert r["best_teacher"] == max(r["over_student"], key=lambda name: -r["over_student"][name])
        for name, ratio in r["over_student"].items():
            assert ratio == pytest.approx(taken[name, r["context"]] / taken[r["best_student"], r["context"]])
    peak = distill["peak"]
    assert peak["ratio"] == pytest.approx(peak["attention"]["peak"] / peak["teacher"]["peak"])
    for profile in distill["profiles"].values():
        assert sum(group["share"] for group in profile["groups"]) == pytest.approx(1, abs=0.05)
    taken = {row["name"]: row["seconds"]["median"] for row in load["rows"]}
    assert load["converted_over_original"] == pytest.approx(taken["converted"] / taken["the original"])
    first, last = found["memory"]["rows"]
    assert found["memory"]["last_over_first"] == pytest.approx(last["peak"] / first["peak"])


TABLES = {
    "prefill": ("GFLOP/s float32", "student / no attention", "student ahead", "64 tokens, 32 at a time", "matmul"),
    "decode": ("teacher, static cache / best", "teacher's best", "largest / smallest", "cache"),
    "batch": ("2 sequences", "a KV cache takes", "in this machine", "such states, or KV caches of"),
    "memory": ("above weights", "last / first", "a KV cache would be"),
    "distill": ("attention, packed", "of", "peak memory", "student, a token", "step of lora", "matrix products"),
    "load": ("converted / original", "of the original", "linearize inspect --no-verify"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_tables(found: dict[str, dict[str, Any]], name: str, cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    from linearize.cli.console import Console

    benched.benchmark(Console(), found[name])
    shown = capsys.readouterr().out
    assert all(part in shown for part in TABLES[name]), shown


def test_a_table_of_its_own(cli: Cli, converted: Path) -> None:
    done = cli("bench", "prefill", converted, "--lengths", "16", "--repeats", "1", "--device", "cpu")
    assert done.code == 0, done.err
    assert "student" in done.out
    assert "bench: prefill" in done.err


@pytest.mark.parametrize(
    ("value", "text"), [(0.0123456, "12.3 ms"), (0.0001, "0.10 ms"), (9.994e-3, "9.99 ms"), (1.0, "1.00 s"), (123.4, "123 s")]
)
def test_seconds_have_three_digits(value: float, text: str) -> None:
    assert benched.seconds(value) == text


def test_a_folder_that_is_gone_is_measured_against_the_same_network(cli: Cli, converted: Path, tmp_path: Path) -> None:
    import shutil

    from linearize.checkpoint import write_manifest

    moved = tmp_path / "tiny"
    shutil.copytree(converted, moved)
    path = moved / "config.json"
    config = json.loads(path.read_text())
    config["linearize"]["source"]["path"] = str(tmp_path / "gone")
    path.write_text(json.dumps(config))
    write_manifest(moved)
    made = json.loads(cli("bench", "load", moved, "--repeats", "1", "--device", "cpu", "--json").out)
    assert made["over"] == "the same network unconverted"
    assert [row["name"] for row in made["rows"]][:2] == ["converted", "the same network unconverted"]


REFUSED = [
    ("prefill", ("--lengths", "many"), 2, "'many' is not a number of tokens"),
    ("prefill", ("--lengths", ""), 2, "--lengths needs a number of tokens"),
    ("prefill", ("--repeats", "0"), 2, "'--repeats'"),
    ("distill", ("--parts", "ratio,speed"), 2, "unknown part 'speed'"),
    ("distill", ("--stage", "long"), 2, "stage long is LoRA on longer rows"),
    ("decode", ("--llama-cpp", "a.gguf"), 5, "llama-cpp-python is not installed"),
    ("decode", ("--device", "cuda:77"), 5, "device 'cuda:77' is not available"),
]


@pytest.mark.parametrize(("name", "flags", "code", "line"), REFUSED)
def test_refused(
    cli: Cli, converted: Path, monkeypatch: pytest.MonkeyPatch, name: str, flags: tuple[str, ...], code: int, line: str
) -> None:
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda module: None)
    done = cli("bench", name, converted, *flags)
    assert done.code == code, done.err
    first, second = done.err.splitlines()[-2:]
    assert first.startswith("error: ")
    assert line in first
    assert second.startswith("fix: ")
    assert done.out == ""


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "load"])
def test_an_encoder_and_a_plain_model_are_refused(cli: Cli, model: Path, tmp_path: Path, name: str) -> None:
    assert cli("bench", name, model).code == 4
    write_encoder(tmp_path / "bert")
    assert cli("convert", tmp_path / "bert", "--method", "hedgehog", "-o", tmp_path / "out").code == 0
    done = cli("bench", name, tmp_path / "out")
    assert done.code == 4
    assert "this is an encoder" in done.err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_benchmark_has_examples_that_start_with_it(cli: Cli, name: str) -> None:
    done = cli("bench", name, "--help")
    assert done.code == 0
    assert 2 <= done.out.split("Examples:")[1].count(f"linearize bench {name} ") <= 5


def test_the_list_of_benchmarks(cli: Cli) -> None:
    done = cli("bench")
    assert done.code == 0
    assert done.out == cli("bench", "--help").out
    assert all(f"\n  {name} " in done.out for name in COMMANDS)
    assert cli("bench", "speed").code == 2
