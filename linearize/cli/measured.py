"""What an evaluation found, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from linearize.cli.console import Column, Console
from linearize.cli.show import errors
from linearize.cli.units import figure, number, percent, size


def evaluation(console: Console, found: Mapping[str, Any]) -> None:
    """Fidelity to the teacher, by position too, layer errors, recall, speed, tasks, and what they mean."""
    model, text = f"{found['model']}  {found['method']}", f"{found['text']}  {found['tokens']:,} tokens"
    documents = f" of {found['documents']} documents" if found.get("documents") else ""
    how = f"{environment['dtype']}, {environment['threads']} threads" if (environment := found.get("environment")) else ""
    console.facts([("model", model), ("text", text + documents), *([("run in", how)] if how else [])])
    console.say()
    between = ("ratio 95%",) if any(r.get("ratio_interval") for r in found["rows"]) else ()
    rows = []
    for r in found["rows"]:
        interval = [spread(r.get("ratio_interval")) for _ in between]
        rows.append((r["name"], figure(r["perplexity"]), figure(r["ratio"], 3), *interval, *fidelity(r)))
    columns = ("perplexity", "ratio", *between, "top-1", "KL", "state")
    console.table((Column("model"), *(Column(title, True) for title in columns)), rows)
    if any(len(row["buckets"]) > 1 for row in found.get("positions") or ()):
        positions(console, found["positions"])
    if any(layer.get("relative_error") is not None for layer in found.get("layers") or ()):
        errors(console, [layer for layer in found["layers"] if layer.get("relative_error") is not None])
    if found.get("recall_by_length"):
        recall(console, found["recall_by_length"])
    if found.get("speed"):
        speed(console, found["speed"])
    if found.get("tasks"):
        tasks(console, found["tasks"])
    repeated = [f"{r['name']} {percent(r['repetition'])}" for r in found["rows"] if r.get("repetition") is not None]
    if repeated:
        console.say()
        console.facts([("repetition", ", ".join(repeated))])
    for note in found.get("notes", ()):
        console.say(f"note: {note}")


def fidelity(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return percent(row["top1"]), figure(row["kl"], 4), size(row["state_bytes"])


def spread(interval: Sequence[float] | None) -> str:
    return "" if not interval else f"{interval[0]:.3f}-{interval[1]:.3f}"


def positions(console: Console, found: Sequence[Mapping[str, Any]]) -> None:
    """Perplexity by range of positions."""
    ranges = [f"to {b['to']:,}" for b in found[0]["buckets"]]
    console.say()
    rows = [(row["name"], *(figure(b["perplexity"]) if b["tokens"] else "-" for b in row["buckets"])) for row in found]
    documents = ("documents", *(str(b["documents"]) for b in found[0]["buckets"]))
    console.table((Column("perplexity, tokens"), *(Column(title, True) for title in ranges)), [*rows, documents])


def recall(console: Console, found: Sequence[Mapping[str, Any]]) -> None:
    """Share of the answers by task and length."""
    names = list(found[0]["scores"])
    console.say()
    console.table(
        (Column("recall"), *(Column(title, True) for title in ("at", *names, "student 95%", "prompts"))),
        [
            (
                row["task"], f"{row['length']:,}", *(percent(row["scores"][name]["accuracy"]) for name in names),
                "-".join(f"{100 * x:.0f}" for x in row["scores"]["student"]["interval"]), str(row["samples"]),
            )
            for row in found
        ],
    )  # fmt: skip


def speed(console: Console, found: Mapping[str, Any]) -> None:
    """Reading, decoding and memory by length, and where the student gets ahead."""
    names = [name for name in ("teacher", "student") if name in found["rows"][0]]
    columns = (Column("model"), *(Column(title, True) for title in ("tokens", "prefill tok/s", "decode tok/s", "memory")))
    rows = []
    for name in names:
        for row in found["rows"]:
            own, length = row[name], row["length"]
            prefill = number(length / max(own["prefill_seconds"], 1e-9))
            rows.append((name, f"{length:,}", prefill, figure(own["decode_tokens_per_second"], 1), size(own["bytes"])))
    console.say()
    console.table(columns, rows)
    longest = found["rows"][-1]["length"]
    crossings = [
        f"{name} {'from ' + format(round(at), ',') if at else f'not up to {longest:,}'}" for name, at in found["crossover"].items()
    ]
    console.facts([("student ahead", ", ".join(crossings))])


def tasks(console: Console, found: Mapping[str, Any]) -> None:
    """Tasks of the harness, and which letters were chosen."""
    rows = []
    for task, entry in found.items():
        for name, metrics in entry["metrics"].items():
            chosen = entry["letters"].get(name, {})
            told = ", ".join(f"{key} {value:.3f}" for key, value in metrics.items() if not key.endswith("_stderr"))
            rows.append((task, name, told, " ".join(f"{letter}{count}" for letter, count in chosen.items())))
        if entry["right"]:
            rows.append((task, "right answers", "", " ".join(f"{letter}{count}" for letter, count in entry["right"].items())))
    console.say()
    console.table((Column("task"), Column("model"), Column("result"), Column("letters chosen")), rows)
