"""report.html: one file that needs nothing else, of one evaluation or of several side by side."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from linearize.checkpoint import read_manifest
from linearize.errors import UsageError
from linearize.evaluation import plots
from linearize.evaluation.card import number, spread

MEASURED, REPORT, COMPARISON = "evaluation.json", "report.html", "comparison.html"
OURS = '<meta name="generator" content="linearize">'
METRICS, RECIPE = "metrics.jsonl", "recipe.json"
Table = tuple[Sequence[str], list[Sequence[str]]]


@dataclass(frozen=True)
class Entry:
    """One checkpoint: what was measured, how it was trained, the recipe that made it."""

    name: str
    found: Mapping[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    resolved: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, directory: Path, found: Mapping[str, Any]) -> Entry:
        """With the files of the checkpoint's folder that are there."""
        metrics, recipe = directory / METRICS, directory / RECIPE
        lines = [json.loads(x) for x in metrics.read_text(encoding="utf-8").splitlines() if x] if metrics.exists() else []
        resolved = json.loads(recipe.read_text(encoding="utf-8")) if recipe.exists() else {}
        return cls(str(directory), found, lines, resolved)

    @property
    def recipe(self) -> str:
        return json.dumps(self.resolved, indent=2, ensure_ascii=False)

    @property
    def environment(self) -> str:
        return json.dumps(self.found.get("environment", {}), indent=2, ensure_ascii=False)


def check_page(page: Path) -> None:
    """UsageError where a page cannot be written, or would take the place of something that is none of ours."""
    if page.is_dir():
        raise UsageError("the page is a folder", str(page), f"-o {page / REPORT}")
    if not page.resolve().parent.is_dir():
        raise UsageError("no such folder", str(page.parent), "make it, or choose another file with -o")
    if page.exists() and OURS not in page.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise UsageError("the file exists and is no report", str(page), "choose another file with -o")


def write_atomically(path: Path, text: str) -> Path:
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def as_json(value: Any) -> Any:
    """The same figures as JSON holds them: lists for tuples, null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): as_json(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def weights_of(directory: Path) -> dict[str, str]:
    """The manifest's hashes of the weight files: whether figures belong to them."""
    return {name: entry["sha256"] for name, entry in read_manifest(directory)["files"].items() if name.endswith(".safetensors")}


def measured_before(directory: Path) -> dict[str, Any] | None:
    """What an earlier report measured on these very weights; None where it measured others, or nothing that can be read."""
    try:
        found = json.loads((directory / MEASURED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    good = isinstance(found, dict) and "asked" in found and found.get("weights") == weights_of(directory)
    return found if good else None


def render(entries: Sequence[Entry]) -> str:
    """The page. Everything that a checkpoint says is escaped; no script, and nothing is fetched."""
    from jinja2 import Environment
    from markupsafe import Markup

    source = Path(__file__).with_suffix(".html.j2").read_text(encoding="utf-8")
    page = Environment(autoescape=True, trim_blocks=True).from_string(source)
    many = len(entries) > 1
    drawn = {name: [Markup(svg) for svg in found if svg] for name, found in drawings(entries).items()}
    tables = {"fidelity": fidelity(entries), "buckets": buckets(entries), "recall": recall(entries), "tasks": tasks(entries)}
    title = " · ".join(Path(entry.name).name for entry in entries)
    prefix = (lambda entry: f"{entry.name}: ") if many else (lambda entry: "")
    maps = [(task, [Markup(svg) for svg in own]) for task, own in recall_maps(entries)]
    given = {
        "title": title,
        "entries": entries,
        "plots": drawn,
        "maps": maps,
        "grid": grid,
        "prefix": prefix,
        "crossings": crossings(entries),
    }
    return page.render(given | tables)


def grid(made: Table) -> Any:
    """A table; columns of numbers stand right."""
    from markupsafe import Markup

    header, rows = made
    right = [all(row[i][:1] in "0123456789-" for row in rows) for i in range(len(header))]

    def cell(kind: str, position: int, value: str) -> Any:
        return Markup("<{0}{1}>{2}</{0}>").format(kind, Markup(' class="n"' if right[position] else ""), value)

    lines = [Markup("<tr>{}</tr>").format(Markup("").join(cell("th", i, x) for i, x in enumerate(header)))]
    for row in rows:
        mark = Markup(' class="student"') if row[0].split(": ")[-1] == "student" else ""
        lines.append(Markup("<tr{}>{}</tr>").format(mark, Markup("").join(cell("td", i, x) for i, x in enumerate(row))))
    return Markup("<table>{}</table>").format(Markup("\n").join(lines))


def named(entries: Sequence[Entry], entry: Entry, who: str) -> str:
    """A row's name: with its checkpoint's where there are several."""
    return who if len(entries) == 1 else f"{Path(entry.name).name}: {who}"


def fidelity(entries: Sequence[Entry]) -> Table:
    header = ("model", "perplexity", "ratio", "95%", "top-1", "KL", "repetition", "state")
    rows: list[Sequence[str]] = []
    for entry in entries:
        for row in entry.found["rows"]:
            state = "-" if row["state_bytes"] is None else f"{row['state_bytes'] / 1e6:.3g} MB"
            figures = (number(row["perplexity"], 2), number(row["ratio"], 3), spread(row.get("ratio_interval")))
            rest = (number(row["top1"], 3), number(row["kl"], 4), number(row.get("repetition"), 3), state)
            rows.append((named(entries, entry, row["name"]), *figures, *rest))
    return header, rows


def buckets(entries: Sequence[Entry]) -> Table:
    every = sorted({(b["from"], b["to"]) for e in entries for row in e.found["positions"] for b in row["buckets"]})
    header = ("perplexity, tokens", *(f"{a:,} to {b:,}" for a, b in every))
    rows: list[Sequence[str]] = []
    for entry in entries:
        for row in entry.found["positions"]:
            told = [b for b in row["buckets"] if b["tokens"]]
            own = {(b["from"], b["to"]): number(b["perplexity"], 2) + spread(b["perplexity_interval"]) for b in told}
            rows.append((named(entries, entry, row["name"]), *(own.get(key, "-") for key in every)))
    return header, rows


def recall(entries: Sequence[Entry]) -> Table:
    """A row for each task and length, a column for each model."""
    columns = {label: (entry, who) for label, entry, who in recalling(entries)}
    header = ("task", "tokens", "prompts", *columns)
    asked = {(row["task"], row["length"]): row["samples"] for entry in entries for row in entry.found["recall_by_length"]}
    rows: list[Sequence[str]] = []
    for (task, length), prompts in asked.items():
        cells = []
        for entry, who in columns.values():
            own = [r["scores"] for r in entry.found["recall_by_length"] if (r["task"], r["length"]) == (task, length)]
            cells.append(share(own[0][who]) if own and who in own[0] else "-")
        rows.append((task, f"{length:,}", str(prompts), *cells))
    return header, rows


def share(score: Mapping[str, Any]) -> str:
    low, high = (100 * x for x in score["interval"])
    return f"{100 * score['accuracy']:.0f}% [{low:.0f}, {high:.0f}] · {100 * score['exact']:.0f}%"


def recalling(entries: Sequence[Entry]) -> list[tuple[str, Entry, str]]:
    """Label, checkpoint and name of each model that was asked: of several checkpoints the students, teacher and window once."""
    found = []
    for entry in entries:
        for who in dict.fromkeys(name for row in entry.found["recall"] for name in row["scores"]):
            if entry is entries[0] or who == "student":
                found.append((named(entries, entry, who) if who == "student" else who, entry, who))
    return found


def tasks(entries: Sequence[Entry]) -> Table | None:
    rows: list[Sequence[str]] = []
    for entry in entries:
        for task, own in entry.found["tasks"].items():
            for who, metrics in own["metrics"].items():
                told = ", ".join(f"{key} {value:.3f}" for key, value in metrics.items())
                rows.append((named(entries, entry, task), who, told, letters(own["letters"].get(who, {})), letters(own["right"])))
    return (("task", "model", "result", "letters chosen", "letters that are right"), rows) if rows else None


def letters(counts: Mapping[str, int]) -> str:
    return " ".join(f"{letter} {count}" for letter, count in counts.items())


def crossings(entries: Sequence[Entry]) -> list[str]:
    """Where each student gets ahead of its teacher."""
    found = []
    for entry in entries:
        if measured := entry.found["speed"].get("crossover"):
            longest = entry.found["speed"]["rows"][-1]["length"]
            ends = {what: f"from {round(at):,}" if at else f"not up to {longest:,}" for what, at in measured.items()}
            said = (f"{what} {end} tokens" for what, end in ends.items())
            found.append(f"{named(entries, entry, 'student')} ahead of its teacher: {', '.join(said)}.")
    return found


def drawings(entries: Sequence[Entry]) -> dict[str, list[str]]:
    """The plots by section. Of several checkpoints, lines share an axis: the students', and the first one's teacher and window."""
    curves, sides = {}, dict[str, tuple[str, Mapping[str, Any]]]()
    for i, entry in enumerate(entries):
        for row in entry.found["positions"]:
            if i == 0 or row["name"] == "student":
                curves[named(entries, entry, row["name"]) if row["name"] == "student" else row["name"]] = row["curve"]
        for who in ("teacher", "student"):
            if entry.found["speed"] and who in entry.found["speed"]["rows"][0] and (i == 0 or who == "student"):
                sides[who if who == "teacher" else named(entries, entry, who)] = (who, entry.found["speed"])
    speed = []
    sides_of: tuple[tuple[str, str, Callable[[Mapping[str, float], int], float]], ...] = (
        ("Prefill", "tokens a second", lambda row, n: n / max(row["prefill_seconds"], 1e-9)),
        ("Decoding", "tokens a second", lambda row, n: row["decode_tokens_per_second"]),
        ("Memory", "bytes", lambda row, n: row["bytes"]),
    )
    for title, unit, figure in sides_of:
        lines = {
            name: ([r["length"] for r in found["rows"]], [figure(r[who], r["length"]) for r in found["rows"]])
            for name, (who, found) in sides.items()
        }
        speed.append(plots.against_length(title, unit, lines))
    layers = []
    for entry in entries:
        for title, draw in (("Hidden states' error", plots.streams), ("Heads' error", plots.heads), ("Far share", plots.shares)):
            layers.append(draw(named(entries, entry, title), entry.found["layers"]))
    return {
        "positions": [
            plots.positions("Perplexity by position", curves),
            plots.positions("Perplexity over the teacher's", curves, over="teacher"),
        ],
        "losses": [plots.losses(f"Loss of {Path(entry.name).name}", entry.metrics) for entry in entries],
        "layers": layers,
        "speed": speed,
    }


def recall_maps(entries: Sequence[Entry]) -> list[tuple[str, list[str]]]:
    """By task, a map for each model."""
    maps = []
    for task in dict.fromkeys(row["task"] for entry in entries for row in entry.found["recall"]):
        drawn = [plots.recall(task, who, label, entry.found["recall"]) for label, entry, who in recalling(entries)]
        maps.append((task, [svg for svg in drawn if svg]))
    return maps
