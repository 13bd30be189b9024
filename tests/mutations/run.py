"""Break the runtime in one place at a time and see the law tests fail: python tests/mutations/run.py [NAME ...].

The mutations are in the .toml files beside this one, by part of the runtime: in `file`, `old` (nothing: the end) becomes `new`, and
`test` must fail. Each is made in a copy of the package, in a fork of this process, which has imported torch but nothing of the
package. Exit code 1 if one survives. Needs Python 3.11. A test is one of
    LAW,LAW WORD WORD    test_mixers.py for these laws where its id, or what else the spec says, has all the words, until one fails
    FILE.py -k ...       what pytest takes, in tests/laws or in the folder of tests that FILE names
and an import that fails is no catch. `--sound` runs the same tests with nothing broken: all must pass.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch
from transformers import DynamicCache, GenerationConfig, LlamaForCausalLM  # noqa: F401 - here once, for all forks

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RUNTIME = Path("linearize") / "modeling"
FORK = multiprocessing.get_context("fork")
Case = tuple[str, str, dict[str, Any], int]  # of test_mixers.py: law, id with the spec's fields, these fields, kv heads

Mutation = tuple[str, str, str, str]  # file, old, new, test


def read_mutations() -> dict[str, Mutation]:
    found = {}
    for path in sorted(HERE.glob("*.toml")):
        for entry in tomllib.loads(path.read_text(encoding="utf-8"))["mutation"]:
            found[entry["name"]] = (entry["file"], entry["old"], entry["new"], entry["test"])
    return found


MUTATIONS = read_mutations()


# ---- in a fork ----


class Watch:
    """A pytest plugin that keeps the first failure."""

    failure: str | None = None
    broken: str | None = None
    passed = 0

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.broken = f"{report.nodeid} is not collected: {report.longreprtext[-300:]}"

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.passed += report.passed and report.when == "call"
        if report.failed and self.failure is None:
            crash = getattr(report.longrepr, "reprcrash", None)
            what = crash.message[:120] if crash else "error"
            self.failure = f"{what}, {report.nodeid.rpartition('/')[2]}"


def by_pytest(tests: str) -> tuple[str | None, str | None]:
    """(what failed, what kept the tests from running)."""
    file, _, words = tests.partition(" -k ")
    chosen = ["-k", words.strip("'\"")] if words else []
    watch = Watch()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pytest.main(
            ["-x", "-q", "-n0", "-p", "no:cacheprovider", str(Path("tests") / (file if "/" in file else f"laws/{file}")), *chosen],
            plugins=[watch],
        )
    return watch.failure, watch.broken or (None if watch.failure or watch.passed else f"NO TEST is '{tests}'")


def by_laws(tests: str, cases: list[Case]) -> tuple[str | None, str | None]:
    from linearize.modeling.spec import MixerSpec
    from linearize.testing.laws import LAWS

    names, *words = tests.split()
    chosen = [case for case in cases if case[0] in names.split(",") and all(word in case[1] for word in words)]
    for law, text, fields, kv_heads in chosen:
        torch.manual_seed(0)
        try:
            LAWS[law](MixerSpec(**fields), kv_heads)
        except Exception as error:
            return f"{type(error).__name__}: {error}, {text.split()[0]}", None
    return None, None if chosen else f"NO TEST is '{tests}'"


class Collect:
    """A pytest plugin that keeps the cases of every law."""

    cases: list[Case]

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        from linearize.testing.points import describe

        params = [(item.name, item.callspec.params) for item in items if hasattr(item, "callspec")]
        self.cases = [
            (own["law"], f"{name} {describe(own['spec'])}", own["spec"].to_dict(), own["kv_heads"])
            for name, own in params
            if {"law", "spec", "kv_heads"} <= own.keys()
        ]


def all_cases() -> list[Case]:
    collect = Collect()
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["--collect-only", "-q", "-n0", "-p", "no:cacheprovider", "tests/laws/test_mixers.py"], plugins=[collect])
    return collect.cases


def forked(folder: Path, work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns in a fork of this process that imports the package from `folder`; None if it dies."""
    here, there = FORK.Pipe(duplex=False)

    def child() -> None:
        os.chdir(folder)
        sys.path[:0] = [str(folder)]
        torch.set_num_threads(1)
        there.send(work(*arguments))

    process = FORK.Process(target=child)
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        return None
    finally:
        process.join()


# ---- here ----


def broken_copy(name: str, folder: Path) -> None:
    for part in ("linearize", "tests/laws", "tests/parity"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "tests/conftest.py"):
        shutil.copy(ROOT / part, folder / part)
    file, old, new, _ = MUTATIONS[name]
    path = folder / RUNTIME / file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(old, new) if old else text + new, encoding="utf-8")


def misplaced() -> list[str]:
    """Mutations whose old text does not stand in the runtime exactly once."""
    found = []
    for name, (file, old, *_) in MUTATIONS.items():
        count = (ROOT / RUNTIME / file).read_text(encoding="utf-8").count(old) if old else 1
        if count != 1:
            found.append(f"{name}: {file} says {count} times: {old}")
    return found


def main(arguments: list[str]) -> int:
    sound = "--sound" in arguments
    chosen = [name for name in arguments if name != "--sound"] or list(MUTATIONS)
    if problems := [*misplaced(), *(f"no mutation '{name}'" for name in chosen if name not in MUTATIONS)]:
        raise SystemExit("\n".join(problems))
    by_test = {MUTATIONS[name][3]: name for name in chosen}
    cases = forked(ROOT, all_cases) if any(".py" not in test for test in by_test) else []
    if cases is None:
        raise SystemExit("test_mixers.py is not collected")
    wrong = 0
    for name in by_test.values() if sound else chosen:
        tests, start = MUTATIONS[name][3], time.monotonic()
        run = (by_pytest, tests) if ".py" in tests else (by_laws, tests, cases)
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            if not sound:
                broken_copy(name, Path(folder))
            if not sound and MUTATIONS[name][0].startswith("cpu/"):
                patch.setenv("XDG_CACHE_HOME", folder)  # broken kernels are not kept
            failure, broken = forked(ROOT if sound else Path(folder), *run) or (None, "the fork DIED")
        wrong += bool(broken) or bool(failure) == sound
        seen = broken or failure or ("passes" if sound else "SURVIVES")
        print(f"{tests if sound else name}: {' '.join(seen.split())[:200]} ({time.monotonic() - start:.0f} s)", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
