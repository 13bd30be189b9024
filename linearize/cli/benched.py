"""What a benchmark found, as tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from linearize.cli.console import Column, Console
from linearize.cli.units import number, percent, size

Found = Mapping[str, Any]
LIMITS = ("matmul", "memory", "calls")
SCALES = ("length", "sequences", "context")  # what a row is measured at


def benchmark(console: Console, found: Found) -> None:
    """The machine, the rows, and what follows from them."""
    console.facts([("model", f"{found['model']}  {found['method']}"), ("machine", machine(found))])
    console.say()
    if found["rows"] and "bound" in found["rows"][0]:
        rows(console, found["rows"])
        console.say()
    AFTER[found["benchmark"]](console, found)


def machine(found: Found) -> str:
    """What it can do, as measured in this run."""
    if "machine" not in found:
        return ""
    own, where = found["machine"], found["environment"]["processor"]
    rates = (
        f"{own['matmul'] / 1e9:.0f} GFLOP/s {own['dtype']}, reads {own['read'] / 1e9:.1f} GB/s, {1e6 / own['calls']:.1f} us a call"
    )
    return f"{where}, {own['threads']} threads: {rates}"


def rows(console: Console, found: Sequence[Found]) -> None:
    """Times with their quartiles, and the shares of them that each resource alone would take."""
    scale = next((key for key in SCALES if key in found[0]), "tokens")
    cached = any(one.get("cache_bytes") is not None for one in found)
    columns = (scale, "seconds", "quartiles", "tok/s", *LIMITS, *(("cache",) if cached else ()))
    lines = []
    for one in found:
        spread, bound = one["seconds"], one["bound"]
        shares = [f"{'>' if bound['by'] == limit else ''}{percent(bound[limit])}" for limit in LIMITS]
        taken = (seconds(spread["median"]), f"{seconds(spread['low'])}-{seconds(spread['high'])}", number(one["tokens_per_second"]))
        held = (size(one.get("cache_bytes")),) if cached else ()
        lines.append((one["name"], f"{one[scale]:,}", *taken, *shares, *held))
    console.table((Column("model"), *(Column(title, True) for title in columns)), lines)


def seconds(value: float) -> str:
    """Three digits and a unit."""
    shown, unit = (value, "s") if value >= 0.9995 else (1000 * value, "ms")
    return f"{shown:.{2 if shown < 9.995 else 1 if shown < 99.95 else 0}f} {unit}"


def times(value: float) -> str:
    return f"{value:.2f} x"


def prefill(console: Console, found: Found) -> None:
    lines = [(f"{r['length']:,}", times(r["teacher_over_student"]), times(r["student_over_floor"])) for r in found["ratios"]]
    console.table((Column("length", True), Column("teacher / student", True), Column("student / no attention", True)), lines)
    ahead, longest = found["student_ahead_from"], found["settings"]["lengths"][-1]
    facts = [("student ahead", f"from {round(ahead):,} tokens" if ahead else f"not up to {longest:,} tokens")]
    if "long" in found:
        own = found["long"]
        memory = f"{size(own['above_weights'])} above {size(own['weights'])} of weights{counted(own)}"
        facts.append(("long text", f"{own['tokens']:,} tokens, {own['chunk']:,} at a time: {memory}"))
    console.facts(facts)


def counted(own: Found) -> str:
    """A peak that the system did not let begin again after loading."""
    return " (what loading took is in it)" if own["loading_counts"] else ""


def decode(console: Console, found: Found) -> None:
    names = list(dict.fromkeys(name for r in found["ratios"] for name in r["over_student"]))
    lines = [
        (
            f"{r['context']:,}",
            *(times(r["over_student"][n]) if n in r["over_student"] else "-" for n in names),
            r["best_student"],
            r["best_teacher"],
        )
        for r in found["ratios"]
    ]
    columns = (
        Column("context", True),
        *(Column(f"{name} / best", True) for name in names),
        Column("student's best"),
        Column("teacher's best"),
    )
    console.table(columns, lines)
    if "flat" in found:
        own = found["flat"]
        taken = ", ".join(f"{seconds(s['median'])} at {int(context):,}" for context, s in own["seconds"].items())
        console.facts([(own["name"], f"{taken}: largest / smallest {own['largest_over_smallest']:.3f}")])


def batch(console: Console, found: Found) -> None:
    own = found["memory"]
    if found["ratios"]:
        ratios = ", ".join(f"{times(r['teacher_over_student'])} at {r['sequences']}" for r in found["ratios"])
        console.facts([("teacher / student", ratios)])
    last, context = [row for row in found["rows"] if row["name"] == "student"][-1], found["settings"]["context"]
    held = f"{size(last['cache_bytes'])} of states" + (f", the process at most {size(last['peak'])}" if "peak" in last else "")
    console.facts(
        [
            (f"{last['sequences']} sequences", f"of {context:,} tokens: {held}; a KV cache takes {size(last['kv_bytes'])}"),
            ("memory", f"{size(own['machine'])} in this machine"),
            ("it holds", f"{own['sequences_of_states']:,} such states, or KV caches of {own['sequences_of_kv']:,}"),
        ]
    )


def memory(console: Console, found: Found) -> None:
    lines = [(f"{r['tokens']:,}", f"{r['turns']:,}", size(r["peak"]), size(r["above_weights"])) for r in found["rows"]]
    console.table(tuple(Column(title, True) for title in ("tokens", "turns", "peak", "above weights")), lines)
    own = found["process"]
    state = f"{size(own['state'])}; a KV cache would be {size(own['kv'])}"
    console.facts([("last / first", f"{found['last_over_first']:.4f}{counted(own)}"), ("state", state)])


def distill(console: Console, found: Found) -> None:
    lines = [
        (name, f"{r['length']:,}", times(ratio), r["over"]) for r in found["ratios"] for name, ratio in r["throughput"].items()
    ]
    if lines:
        console.table((Column("stage"), Column("length", True), Column("throughput", True), Column("of")), lines)
    facts = []
    if "peak" in found:
        own = found["peak"]
        told = f"attention {size(own['attention']['peak'])}, teacher forward {size(own['teacher']['peak'])}: {times(own['ratio'])}"
        facts.append(("peak memory", told + counted(own["attention"])))
    for name, own in found.get("by_length", {}).items():
        a_token = ", ".join(f"{1e6 * x:.0f} us at {int(length):,}" for length, x in own["seconds_a_token"].items())
        facts.append((f"{name}, a token", f"{a_token}: largest / smallest {own['largest_over_smallest']:.3f}"))
    console.facts(facts)
    for stage, own in found["profiles"].items():
        console.say()
        groups = [(group["group"], percent(group["share"])) for group in own["groups"]]
        console.table((Column(f"step of {stage}"), Column("time", True)), groups)
        operators = [(o["name"], number(o["calls"]), percent(o["share"]), o["group"]) for o in own["operators"]]
        console.table((Column("operator"), Column("calls", True), Column("time", True), Column("group")), operators)


def load(console: Console, found: Found) -> None:
    lines = []
    for one in found["rows"]:
        spread = one["seconds"]
        lines.append((one["name"], seconds(spread["median"]), f"{seconds(spread['low'])}-{seconds(spread['high'])}"))
    console.table((Column("start"), Column("seconds", True), Column("quartiles", True)), lines)
    console.facts([("converted / original", f"{times(found['converted_over_original'])} of {found['over']}")])


AFTER: dict[str, Callable[[Console, Found], None]] = {
    "prefill": prefill, "decode": decode, "batch": batch, "memory": memory, "distill": distill, "load": load
}  # fmt: skip
