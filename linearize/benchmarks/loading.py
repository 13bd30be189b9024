"""Starting: the time that a converted checkpoint takes to load, against the original's, and that commands take to begin."""

from __future__ import annotations

import gc
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from linearize.conversion.convert import load_source
from linearize.conversion.sources import resolve
from linearize.conversion.teacher import unconverted
from linearize.devices import Clock, clock_of, pick_device, pick_dtype
from linearize.errors import LinearizeError, ResourceError
from linearize.evaluation.environment import environment
from linearize.evaluation.timing import Spread, in_turn
from linearize.loading import load
from linearize.opening import check
from linearize.progress import Progress, silent

CONVERTED, WRITTEN = "converted", "the same network unconverted"
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "linearize --help": ("--help",), "linearize inspect": ("inspect",), "linearize inspect --no-verify": ("inspect", "--no-verify")
}  # fmt: skip


def bench_load(
    directory: Path, *, repeats: int = 5, dtype: str = "auto", device: str = "auto", progress: Progress = silent
) -> dict[str, Any]:
    """Seconds to load model and tokenizer, files warm in memory, and to start commands.

    The original is its source's folder. Where that is a GGUF file or not at hand, the same network without mixers is written
    to a folder for the time of the measurement, and a GGUF file, which is unpacked, is a row of its own.
    """
    plan, on = check(directory)["linearize"], pick_device(device)
    with tempfile.TemporaryDirectory() as folder:
        progress("load", 0, 1)
        model, tokenizer = load(directory, dtype=dtype, device=device)
        where, chosen = environment(model, 0), str(model.dtype).removeprefix("torch.")
        runs: dict[str, Callable[[], object]] = {CONVERTED: partial(load, directory, dtype=dtype, device=device)}
        runs |= originals(plan["source"], chosen, device)
        if not any(name.startswith("the original") for name in runs):
            write_unconverted(model, tokenizer, folder)
            runs[WRITTEN] = partial(load_original, folder, chosen, device)
        del model, tokenizer
        progress("bench: load", 0, 1)
        for run in runs.values():
            run()
        seconds = in_turn(runs, repeats, clock_of(on), before=gc.collect)  # models of the runs before are not this one's to free
    progress("bench: commands", 0, 1)
    started = commands(directory, repeats, time.perf_counter)
    base = next(name for name in runs if name.startswith("the original") or name == WRITTEN)
    return {
        "benchmark": "load", "model": str(directory), "method": plan["method"], "environment": where,
        "settings": {"repeats": repeats, "dtype": chosen},
        "rows": [{"name": name, "seconds": spread.to_dict()} for name, spread in (seconds | started).items()],
        "over": base, "converted_over_original": seconds[CONVERTED].median / seconds[base].median,
    }  # fmt: skip


def write_unconverted(model: Any, tokenizer: Any, folder: str) -> None:
    """The network without mixers, as any other model's folder."""
    stock = unconverted(model)
    del stock.config.linearize
    stock.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def originals(source: Mapping[str, Any], dtype: str, device: str) -> dict[str, Callable[[], object]]:
    """What loads the source, where it is still there; nothing else is fetched."""
    path = source.get("path")
    if not path or not Path(path).exists():
        return {}
    name = "GGUF file, unpacked" if source["format"] == "gguf" else "the original"
    return {name: partial(load_original, path, dtype, device)}


def load_original(where: str, dtype: str, device: str) -> None:
    """Model and tokenizer of a source, as convert loads them."""
    on = pick_device(device)
    try:
        model, _ = load_source(resolve(where), pick_dtype(dtype, None, on))
    except LinearizeError as error:
        raise ResourceError(f"the original cannot be loaded ({error})", where, "move it away to compare without it") from error
    model.to(on)


def commands(directory: Path, repeats: int, clock: Clock) -> dict[str, Spread]:
    """Seconds that commands take in a process of their own, from start to end."""

    def run(words: tuple[str, ...]) -> None:
        target = [str(directory)] if words[0] == "inspect" else []
        done = subprocess.run(
            [sys.executable, "-m", "linearize", *words, *target], capture_output=True, text=True, stdin=subprocess.DEVNULL,
            check=False,
        )  # fmt: skip
        if done.returncode:
            raise ResourceError(f"a command failed: {done.stderr.strip()}", f"linearize {' '.join(words)}", "run it alone")

    runs = {name: partial(run, words) for name, words in COMMANDS.items()}
    for one in runs.values():
        one()
    return in_turn(runs, repeats, clock)
