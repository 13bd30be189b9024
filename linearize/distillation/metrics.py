"""What a run tells of its steps: lines in metrics.jsonl, always, and one dictionary for whatever else listens."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


def append(run: Path, line: Mapping[str, Any]) -> None:
    """One line; what is not finite becomes null, for JSON has no word for it."""
    finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()}
    with (run / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite) + "\n")


def forget_after(run: Path, stage: str, step: int) -> None:
    """Leave out the lines of steps that will be taken again: those of this stage after `step`, and half a line at the end."""
    path = run / METRICS
    if not path.exists():
        return
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # the process ended while it wrote
            continue
        if line["stage"] != stage or line["step"] <= step:
            kept.append(text + "\n")
    path.write_text("".join(kept), encoding="utf-8")


def worst(by_layer: Mapping[int, float]) -> str:
    """The layer with the largest loss; one whose loss is not a number is larger than any."""
    if not by_layer:
        return ""
    layer = max(by_layer, key=lambda i: by_layer[i] if math.isfinite(by_layer[i]) else math.inf)
    return f"layer {layer} {by_layer[layer]:.3g}"
