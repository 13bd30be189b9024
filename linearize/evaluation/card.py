"""The model card of a checkpoint: figures of one evaluation between two marks, and nothing else of it touched."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from linearize.checkpoint import CARD
from linearize.errors import InputError

BEGIN, END = "<!-- linearize: measured -->", "<!-- linearize: end of measured -->"
FRONT_BEGIN, FRONT_END = "# linearize: measured", "# linearize: end of measured"
PLAIN = 1000  # from there on a figure has no decimals
SHOWN = {"perplexity": "Perplexity", "kl": "KL to the teacher", "top1": "Top-1 agreement with the teacher"}


def update_card(directory: Path, found: Mapping[str, Any], base: str) -> Path:
    """Write the figures of an evaluation into the checkpoint's README.md; what stands outside our marks stays, byte for byte.

    Front matter that the user has is kept as it is: our keys are added where they are missing, the results in a block of their
    own. A card that is not UTF-8, or whose front matter is no YAML mapping, raises InputError, and nothing is written.
    """
    path = directory / CARD
    try:
        text = path.read_bytes().decode("utf-8") if path.exists() else f"# {base} linearized\n"
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 (byte {error.start})", str(path), "convert it: iconv -t UTF-8") from None
    front, body = split_front(text)
    new = with_front(front, found, base, str(path)) + replaced(body, BEGIN, END, section(found))
    aside = path.with_name(f"{CARD}.tmp-{os.getpid()}")
    try:
        aside.write_bytes(new.encode("utf-8"))
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def split_front(text: str) -> tuple[str, str]:
    """What stands between the first two lines of `---`, and the rest."""
    lines = text.splitlines(keepends=True)
    if not lines or lines[0].rstrip() != "---":
        return "", text
    for number, line in enumerate(lines[1:], start=1):
        if line.rstrip() == "---":
            return "".join(lines[1:number]), "".join(lines[number + 1 :])
    return "", text


def with_front(front: str, found: Mapping[str, Any], base: str, where: str) -> str:
    """The front matter with our block at its end, instead of an older one."""
    import yaml

    own = replaced(front, FRONT_BEGIN, FRONT_END, "").rstrip("\n")
    try:
        known = yaml.safe_load(own) or {}
    except yaml.YAMLError:
        known = None
    if not isinstance(known, dict):
        raise InputError("the front matter is not YAML", where, "correct what stands between the lines of ---")
    facts: dict[str, Any] = {
        "base_model": base, "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["linearize", "linear-attention"], "model-index": [index(found)],
    }  # fmt: skip
    added = {key: value for key, value in facts.items() if key not in known}
    block = yaml.safe_dump(added, sort_keys=False, allow_unicode=True) if added else ""
    return "---\n" + (own + "\n" if own else "") + f"{FRONT_BEGIN}\n{block}{FRONT_END}\n---\n"


def index(found: Mapping[str, Any]) -> dict[str, Any]:
    """The hub's model-index: the student's figures on the text, and by task of recall and of the harness."""
    student = next(row for row in found["rows"] if row["name"] == "student")
    task = {"type": "text-generation", "name": "Text Generation"}
    shown = {key: name for key, name in SHOWN.items() if student.get(key) is not None}
    metrics = [{"type": key, "name": name, "value": round(student[key], 4)} for key, name in shown.items()]
    data = {"type": "text", "name": f"held-out documents of {Path(found['text']).name}"}
    results = [{"task": task, "dataset": data, "metrics": metrics}]
    for row in found.get("recall_by_length", ()):
        value = round(row["scores"]["student"]["accuracy"], 4)
        data = {"type": "recall", "name": f"{row['task']} at {row['length']} tokens"}
        results.append({"task": task, "dataset": data, "metrics": [{"type": "accuracy", "name": "Of the answer", "value": value}]})
    for name, entry in found.get("tasks", {}).items():
        own = entry["metrics"].get("student", {})
        metrics = [{"type": key, "name": key, "value": round(x, 4)} for key, x in own.items() if not key.endswith("_stderr")]
        results.append({"task": task, "dataset": {"type": name, "name": name}, "metrics": metrics})
    return {"name": Path(found["model"]).name, "results": results}


def replaced(text: str, begin: str, end: str, new: str) -> str:
    """The text with what stands between two marks replaced; at the end where there are none yet, gone where `new` is empty."""
    before, mark, rest = text.partition(begin)
    if mark and end in rest:
        after = rest.partition(end)[2]
        return before + f"{begin}\n{new}{end}" + after if new else before.rstrip("\n") + "\n" + after.lstrip("\n")
    if not new:
        return text
    return text.rstrip("\n") + f"\n\n{begin}\n{new}{end}\n"


def section(found: Mapping[str, Any]) -> str:
    """What was measured, in Markdown."""
    environment = found.get("environment", {})
    how = f"{environment.get('dtype', '')}, {environment.get('written', '')[:10]}"
    made = f"{found['tokens']:,} tokens of {found['documents']} documents, {how}"
    lines = ["## Measured", "", f"On {Path(found['text']).name}, {made}; 95% intervals over documents in brackets.", ""]
    rows: list[Sequence[object]] = []
    for row in found["rows"]:
        state = "-" if row["state_bytes"] is None else f"{row['state_bytes'] / 1e6:.2f} MB"
        ratio = number(row["ratio"], 3) + spread(row.get("ratio_interval"))
        rows.append((row["name"], number(row["perplexity"], 2), ratio, number(row["top1"], 3), number(row["kl"], 4), state))
    lines += table(("model", "perplexity", "ratio to the teacher", "top-1", "KL", "state"), rows)
    if recall := found.get("recall_by_length"):
        names = list(recall[0]["scores"])
        rows = []
        for row in recall:
            shares = (number(row["scores"][name]["accuracy"], 2) for name in names)
            rows.append((row["task"], f"{row['length']:,}", *shares, row["samples"]))
        lines += ["Share of the answer recalled from at least three windows back:", ""]
        lines += table(("task", "tokens", *names, "prompts"), rows)
    for name, entry in found.get("tasks", {}).items():
        told = "; ".join(f"{who} " + ", ".join(f"{k} {x:.3f}" for k, x in m.items()) for who, m in entry["metrics"].items())
        lines += [f"{name} ({entry['examples']} examples): {told}", ""]
    lines += [f"- {note}" for note in found["notes"]]
    return "\n".join(lines) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A Markdown table, and the empty line after it."""
    every: list[Sequence[object]] = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in every] + [""]


def number(value: float | None, digits: int) -> str:
    """With so many digits behind the point; none where they say nothing."""
    return "-" if value is None else f"{value:.{digits if abs(value) < PLAIN else 0}f}"


def spread(interval: Sequence[float] | None) -> str:
    return "" if not interval else f" [{number(interval[0], 3)}, {number(interval[1], 3)}]"
