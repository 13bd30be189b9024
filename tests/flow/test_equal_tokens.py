"""recipes/equal_tokens.py: what it types makes the mixers and the stages that it says, all on as many tokens."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli.tiny import ROOT, write_model

from linearize.conversion.plan import make_plan
from linearize.methods.base import Stage
from linearize.methods.layout import stages_of
from linearize.recipe import Recipe, recipe_of

TOKENS = {"attention": 2048, "lora": 1024}
Words = list[str]


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Words]:
    """What the script typed, after `linearize` or the script's name; each output folder is there afterwards, and nothing in it."""
    spec = importlib.util.spec_from_file_location("equal_tokens", ROOT / "recipes" / "equal_tokens.py")
    assert spec is not None
    assert spec.loader is not None
    script: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    found: list[Words] = []

    def run(words: list[Any], check: bool) -> None:
        own = [str(word) for word in words]
        found.append(own[3:] if own[1] == "-m" else own[1:])
        Path(own[own.index("-o") + 1]).mkdir(parents=True)

    monkeypatch.setattr(script.subprocess, "run", run)
    model = write_model(tmp_path / "tiny")
    flags = ["--attention", "2048", "--lora", "1024", "--data", "text.jsonl", "--model", str(model), "--layout"]
    (tmp_path / "all" / "lolcats-ours").mkdir(parents=True)
    monkeypatch.setattr("sys.argv", ["equal_tokens.py", str(tmp_path / "all"), *flags, "--documents", "3"])
    script.main()
    return found


def after(words: Words, flag: str) -> list[str]:
    return [words[i + 1] for i, word in enumerate(words) if word == flag]


def recipe_typed(words: Words, method: str) -> Recipe:
    return recipe_of(sets=after(words, "--set"), method=method)


def test_every_form_learns_from_as_many_tokens(typed: list[Words]) -> None:
    made = {Path(after(words, "-o")[0]).name: words for words in typed if words[0] == "distill"}
    names = {name for method in ("hedgehog", "lolcats", "liger", "lawcat") for name in (method, f"{method}-ours")}
    assert made.keys() == (names | {"default", "layout"}) - {"lolcats-ours"}, "what was there is not made again"
    for name, words in made.items():
        method = name.removesuffix("-ours") if name != "layout" else "default"
        stages = recipe_typed(words, method).stages
        assert sum(stage.tokens for stage in stages) == sum(TOKENS.values())
        published = [replace(own, tokens=stage.tokens) for own, stage in zip(stages_of(method), stages, strict=True)]
        if not name.endswith("-ours"):
            assert list(stages) == published
        else:
            ours = {stage.kind: stage for stage in stages_of("default")}
            assert [alike(stage) for stage in stages] == [alike(ours[stage.kind]) for stage in stages]


def alike(stage: Stage) -> tuple[str, str, float, float]:
    return stage.kind, stage.loss, stage.lr, stage.mixer_lr


def test_each_is_converted_as_it_is_called(typed: list[Words]) -> None:
    every = [words for words in typed if words[0] == "convert"]
    (recipe,) = (after(words, "--recipe") for words in every if "--recipe" in words)
    (learns,) = (after(words, "--recipe") for words in typed if words[0] == "distill" and "--recipe" in words)
    assert recipe == learns == [str(ROOT / "recipes" / "smollm2-5mb.yaml")]
    for words in (words for words in every if "--recipe" not in words):
        name = Path(after(words, "-o")[0]).name.removesuffix("-untrained")
        options = dict(pair.split("=") for pair in after(words, "--set"))
        start = (after(words, "--start") or ["calibrated"])[0]
        plan = make_plan(words[1], method=after(words, "-m")[0], options=options, start=start)
        assert start == ("published" if name in ("hedgehog", "lolcats", "liger", "lawcat") else "calibrated")
        assert {mixer.sinks for mixer in plan.mixers} == {4 if name.endswith("-ours") or name == "default" else 0}


def test_all_are_read_beside_the_layout(typed: list[Words]) -> None:
    *_, last = typed
    names = [Path(word).name for word in last[:11]]
    assert names[:2] == ["fidelity.py", "layout"]
    assert sorted(names[2:]) == ["default", *(f"{m}{x}" for m in ("hedgehog", "lawcat", "liger", "lolcats") for x in ("", "-ours"))]
    assert after(last, "--documents") == ["3"]
