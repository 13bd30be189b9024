"""Plans, trainings, measurements and checkpoints as tables."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from itertools import groupby
from typing import Any

from linearize.cli.console import Column, Console
from linearize.cli.units import clock, figure, groups, number, pairs, percent, size
from linearize.ranges import span


def plan(console: Console, made: Mapping[str, Any]) -> None:
    """What becomes of each layer, and what that costs."""
    source = made["source"]
    where = "" if source.get("path") in (None, source["id"]) else str(source["path"])
    called = source["id"] + at(source)
    alias = f"('{source['given']}')" if source.get("given") not in (None, source["id"], where) else ""
    count, kept = len(made["layers"]), made.get("kept_by_cost")
    console.facts(
        [
            ("model", "  ".join(x for x in (called, alias, made["architecture"], f"{count} layers") if x)),
            ("from", where),
            ("limits", made.get("limits", "")),
            ("method", "  ".join(x for x in (made["method"], pairs(made["options"]), f"start {made['start']}") if x)),
            ("kept", f"{kept} of these layers, whose swap costs most when convert measures it" if kept else ""),
        ]
    )
    console.say()
    layers(console, made)
    if made["kv_bytes"]:
        memory(console, made)
    if "conversion" in made:
        console.facts([("conversion", route(made["conversion"]))])
    if "estimates" in made:
        estimates(console, made["estimates"])


def route(found: Mapping[str, Any]) -> str:
    """Whether the weights are ever whole in memory."""
    return f"streamed, peak about {size(found['peak_bytes'])}" if found["streamed"] else f"in memory ({found['reason']})"


def estimates(console: Console, found: Mapping[str, Any]) -> None:
    """Memory, disk and the time of each stage on this machine."""
    disk = f"{size(found['disk_bytes'])}, {size(found['free_bytes'])} free to write it"
    rate = f"at {found['rate'] / 1e9:.0f} GFLOP/s in {found['dtype']}, as measured now"
    console.facts([("memory", f"about {size(found['peak_bytes'])} beside Python's own"), ("disk", disk)])
    console.say()
    console.table(
        (Column("stage"), Column("tokens", True), Column("time, about", True)),
        [(kind, number(found["tokens"][kind]), clock(seconds)) for kind, seconds in found["seconds"].items()],
    )
    console.facts([("", rate)])


def at(source: Mapping[str, Any]) -> str:
    return f" @{str(source['revision'])[:8]}" if source.get("revision") else ""


def layers(console: Console, made: Mapping[str, Any]) -> None:
    """One row for each run of layers that are alike."""

    def kind(layer: Mapping[str, Any]) -> tuple[Any, ...]:
        return layer.get("was", "softmax"), layer["becomes"], layer["parameters"], layer["state_bytes"]

    rows, unkept = [], "grows" if made["kv_bytes"] else "none"  # an encoder keeps nothing from call to call
    for (was, becomes, parameters, state), run in groupby(made["layers"], key=kind):
        indices = [layer["index"] for layer in run]
        each = " each" if len(indices) > 1 else ""
        added = f"{number(parameters)}{each}" if parameters else "0"
        rows.append((span(indices), was, becomes, added, f"{size(state)}{each}" if state else unkept))
    kept = made.get("kept", 0)
    total = f"{len(made['layers']) - kept} of {len(made['layers'])}"
    state = size(made["state_bytes"]) + (" + KV" if kept else "") if made["kv_bytes"] else "none"
    rows.append(("total", "", total, number(made["parameters_added"]), state))
    console.table((Column("layer"), Column("was"), Column("becomes"), Column("+ params", True), Column("state / seq", True)), rows)


def memory(console: Console, made: Mapping[str, Any]) -> None:
    rows = []
    for length, kv in made["kv_bytes"].items():
        saved = made["kv_bytes_saved"][length]
        verdict = f"{size(saved)} saved" if saved >= 0 else f"{size(-saved)} more"
        rows.append((f"{int(length):,} tokens", size(kv), size(kv - saved), verdict))
    console.say()
    console.table((Column("one sequence of"), Column("KV cache", True), Column("now", True), Column("", True)), rows)


def stages(console: Console, trained: Sequence[Mapping[str, Any]]) -> None:
    """What each stage of distillation trained, and how far the loss fell."""
    rows = [
        (
            s["kind"],
            number(s["tokens"]),
            loss(s, "first_loss"),
            loss(s, "last_loss"),
            clock(s.get("seconds", 0)),
            groups(s["trained"]),
        )
        for s in trained
    ]
    numbers = (Column(title, True) for title in ("tokens", "first loss", "last", "time"))
    console.table((Column("stage"), *numbers, Column("trained")), rows)


def loss(stage: Mapping[str, Any], key: str) -> str:
    return "-" if stage.get(key) is None else f"{stage[key]:.4g}"


def errors(console: Console, found: Sequence[Mapping[str, Any]]) -> None:
    """The middle and the worst three of the layers' errors: thirty rows would hide them."""
    order = sorted(found, key=lambda layer: -layer["relative_error"])
    worst = ", ".join(f"layer {layer['index']} {percent(layer['relative_error'])}" for layer in order[:3])
    console.say()
    console.facts([("layer error", f"median {percent(order[len(order) // 2]['relative_error'])}; worst: {worst}")])


def swap_costs(console: Console, costs: Mapping[int, float], converted: Container[int]) -> None:
    """What each layer's swap alone costs, dearest first, and which layers stay for that."""
    if not costs:
        return
    rows = [
        (str(i), figure(costs[i], 4), "converted" if i in converted else "kept") for i in sorted(costs, key=lambda i: -costs[i])
    ]
    console.say()
    console.table((Column("layer"), Column("KL of its swap", True), Column("")), rows)


def frontier(console: Console, found: Sequence[Mapping[str, Any]], chosen: int) -> None:
    """What more bytes would buy, and the layout that was taken as a command."""
    if not found:
        return
    worst = max(layout["recall"] for layout in found)
    rows = [
        (
            "taken" if layout["bytes"] == chosen else "",
            size(layout["bytes"]),
            figure(layout["kl"], 4),
            percent(layout["recall"] / worst if worst else None),
        )
        for layout in found
    ]
    heads = (Column("state / seq", True), Column("expected KL, nats a token", True), Column("recall lost, of the smallest's", True))
    console.table((Column(""), *heads), rows)
    taken = next(layout for layout in found if layout["bytes"] == chosen)
    sets = "".join(f" --set {key}={value}" for key, value in taken["options"].items())
    console.say(f"\nthe same  linearize convert MODEL --method '{taken['method']}'{sets}\n")


def start_errors(console: Console, indices: Sequence[int], found: Sequence[float]) -> None:
    """How far each layer is from the teacher's before any training."""
    if found:
        errors(console, [{"index": i, "relative_error": error} for i, error in zip(indices, found, strict=True)])


def checkpoint(console: Console, found: Mapping[str, Any]) -> None:
    """What a checkpoint is, without loading it."""
    source, files = found["source"], found["files"]
    trained = "; ".join(f"{s['kind']} {number(s['tokens'])} tokens" for s in found["stages"]) or "none"
    console.facts(
        [
            ("path", str(found["path"])),
            ("model", f"{found['model_type']}  from {source['id']}" + at(source)),
            ("method", f"{found['method']}  {pairs(found.get('options', {}))}  start {found['start']}"),
            ("stages", trained + ("  (adapter merged)" if found.get("merged") else "")),
            ("layers", f"{len(found['layers'])} converted: {span(layer['index'] for layer in found['layers'])}"),
            ("kept", f"{found['softmax_layers']} of softmax, whose cache is not in the state" if found["softmax_layers"] else ""),
            ("state", f"{size(found['state_bytes'])} per sequence" if found["kv_bytes"] else "none: it is an encoder"),
            ("KV would be", ", ".join(f"{size(n)} at {int(length):,}" for length, n in found["kv_bytes"].items()) or "none"),
            ("files", "whole, hashes match" if files.get("verified") else "sizes match; hashes not read"),
            ("written by", f"linearize {found['linearize_version']}, schema {found['schema']}"),
        ]
    )


def stats(last: Mapping[str, Any]) -> str:
    """One line after an answer."""
    parts = [
        f"{last['tokens']} tok",
        f"{number(last['tokens_per_second'])} tok/s",
        f"prefill {number(last['prefill_tokens_per_second'])} tok/s",
        f"state {size(last['state_bytes'])}",
        f"KV would be {size(last['kv_bytes'])}",
    ]
    return " · ".join(parts)
