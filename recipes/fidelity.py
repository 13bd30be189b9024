"""How close a checkpoint is to its teacher, on text and needles that no stage saw: python recipes/fidelity.py DIR [CONTROL ...].

    text     whole held-out documents: perplexity at 1,024 tokens by kind of text, at 3,072-4,096 and to 8,192 of long ones
    recall   pass-key at 1k, 2k, 4k; S-NIAH 1-3 and multi-key at 1k, 2k, in essays that are held out too; what the model writes

of teacher, student, student without a part (to 1,024 tokens, or all of them: `--beyond`), window and sinks of the same bytes, and
every CONTROL (a linearized checkpoint, or a folder of transformers'), on the same tokens and prompts. Intervals are 95%: documents
drawn again, in pairs for every ratio, and prompts likewise for every difference; of a share of prompts, Wilson's. `--held-out` is
what `linearize distill --held-out` was.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from linearize import text
from linearize.checkpoint import MANIFEST
from linearize.conversion.teacher import teacher_host
from linearize.devices import pick_device
from linearize.documents import BUILTIN, documents
from linearize.evaluation.environment import environment
from linearize.evaluation.fidelity import recalling, state_of, variants_of
from linearize.evaluation.intervals import bounds, draws
from linearize.evaluation.perplexity import LOSS, TOKENS, Sums, compare, figures
from linearize.evaluation.reading import Variant
from linearize.evaluation.recall import Grid, by_length, retrieval
from linearize.evaluation.texts import Texts
from linearize.loading import load
from linearize.modeling.modeling_linearized import attentions
from linearize.pipeline import measured_documents

SHORT, FROM, LONG, LONGEST = 1024, 3072, 4096, 8192
NEEDLES = ("s-niah-1", "s-niah-2", "s-niah-3", "multi-key")
RECALL = [("pass-key", n) for n in (1024, 2048, 4096)] + [(task, n) for task in NEEDLES for n in (1024, 2048)]
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
TARGETS = {"first": 1.03, "late": 1.04, "pass-key": 0.95, "s-niah-2": 0.85}
Figures = dict[str, Any]


@dataclass(frozen=True)
class Passages:
    """Rows of one document each from its first token on, and the kind of text that each is."""

    texts: Texts
    kinds: list[str]

    def which(self, least: int, kind: str | None = None) -> list[int]:
        """The rows of at least so many tokens."""
        every = enumerate(zip(self.texts.rows, self.kinds, strict=True))
        return [i for i, (row, own) in every if row.ids.shape[1] >= least and kind in (None, own)]


def kinds_of(source: str) -> dict[str, str]:
    """`source` of each document of a .jsonl file that tells it."""
    if not source.endswith(".jsonl"):
        return {}
    rows = (json.loads(line) for line in Path(source).read_text(encoding="utf-8").splitlines() if line.strip())
    return {row["text"]: str(row["source"]) for row in rows if "text" in row and "source" in row}


def passages(tokenizer: Any, docs: Sequence[str], kinds: Mapping[str, str], long: int, longest: int, short: int) -> Passages:
    """The first 8,192 tokens of at most `longest` documents, 4,096 of others up to `long` in all, 1,024 of `short` more.

    Which ones follows from the documents' hashes alone.
    """
    order = sorted(docs, key=text.fingerprint)
    encoded = [(doc, ids) for doc, ids in zip(order, text.tokenise(tokenizer, order), strict=True)]
    taken: dict[str, int] = {}
    for size, most in ((LONGEST, longest), (LONG, long), (SHORT, long + short)):
        fit = (doc for doc, ids in encoded if len(ids) >= size and doc not in taken)
        taken |= {doc: size for doc, _ in zip(fit, range(most - len(taken)), strict=False)}
    chosen = [(doc, ids[: taken[doc]]) for doc, ids in encoded if doc in taken]
    rows = [text.Packed(torch.tensor([ids]), torch.arange(len(ids))[None]) for _, ids in chosen]
    return Passages(Texts(rows, list(range(len(rows)))), [kinds.get(doc, "text") for doc, _ in chosen])


def measure_text(
    variants: list[Variant], found: Passages, rivals: Collection[str], seed: int
) -> tuple[dict[str, Any], dict[str, Sums]]:
    """By place in the documents: each variant's figures against the first one's, over the documents that reach there.

    Only `rivals`, the first among them, are read beyond the first 1,024 tokens.
    """
    near = [variants[0], *(v for v in variants if v.name not in rivals)]
    far = [v for v in variants if v.name in rivals]
    short = compare(near, [row.first(SHORT) for row in found.texts.rows], partial(told, f"text to {SHORT:,}"))
    every = compare(far, found.texts.rows, partial(told, "text"))
    sums = {v.name: own for v, own in zip((*near, *far), (*short, *every), strict=True)}
    sums = {v.name: sums[v.name] for v in variants}
    places: dict[str, Any] = {}
    for title, (rows, first, last) in ranges(found).items():
        cells = {name: s.between(first, last)[rows] for name, s in sums.items() if last <= SHORT or name in rivals}
        weights, teacher = draws(rows, seed), cells[variants[0].name]
        own = {name: figures(x, teacher, weights) for name, x in cells.items()}
        places[title] = {"documents": len(rows), "tokens": int(teacher[:, TOKENS].sum()), "rows": own}
    return places, sums


def ranges(found: Passages) -> dict[str, tuple[list[int], int, int]]:
    """Places: which rows count, from and to which position."""
    by_kind = {f"first {SHORT:,}, {kind}": (found.which(SHORT, kind), 0, SHORT) for kind in sorted(set(found.kinds))}
    places = {f"first {SHORT:,}": (found.which(SHORT), 0, SHORT)} | (by_kind if len(by_kind) > 1 else {})
    places |= {
        f"{FROM:,}-{LONG:,}": (found.which(LONG), FROM, LONG),
        f"{LONG:,}-{LONGEST:,}": (found.which(LONGEST), LONG, LONGEST),
    }
    return {title: place for title, place in places.items() if place[0]}


def growth(teacher: Sums, student: Sums, rows: list[int], seed: int) -> Figures:
    """The ratio to the teacher at 4,096-8,192 over that at 3,072-4,096, on the same documents."""
    weights = draws(rows, seed)

    def logarithm(w: Tensor) -> Tensor:
        """Nats a token of student over teacher, late less early, with documents counted `w` times."""
        found = []
        for first, last in ((LONG, LONGEST), (FROM, LONG)):
            own, other = (w @ s.between(first, last)[rows] for s in (student, teacher))
            found.append((own[..., LOSS] - other[..., LOSS]) / own[..., TOKENS])
        return found[0] - found[1]

    return {
        "value": float(logarithm(torch.ones(len(rows), dtype=torch.float64)).exp()),
        "interval": bounds(logarithm(weights).exp()),
    }


def measure_recall(
    variants: Sequence[Variant],
    tokenizer: Any,
    essays: Sequence[str],
    rivals: Collection[str],
    wanted: Sequence[tuple[str, int]],
    window: int,
    samples: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Rows of the `wanted` tasks and lengths, over all depths; longer prompts than 1,024 tokens are for `rivals` alone."""
    rows = []
    for length in dict.fromkeys(length for _, length in wanted):
        grid = Grid(tuple(task for task, own in wanted if own == length), (length,), DEPTHS, samples, seed)
        asked = {v.name: v for v in variants if length <= SHORT or v.name in rivals}
        rows += retrieval(asked, tokenizer, essays, grid, window, partial(told, f"recall {length:,}"))
    return sorted(by_length(rows), key=lambda row: wanted.index((row["task"], row["length"])))


def difference(own: Sequence[float], other: Sequence[float], seed: int) -> Figures:
    """Mean difference of the shares of the same prompts."""
    apart = torch.tensor(own, dtype=torch.float64) - torch.tensor(other, dtype=torch.float64)
    return {"value": float(apart.mean()), "interval": bounds(draws(range(len(apart)), seed) @ apart / len(apart))}


def against(
    places: Mapping[str, Any], sums: Mapping[str, Sums], names: Sequence[str], found: Passages, recall: Sequence[Any], seed: int
) -> dict[str, Figures]:
    """The student beside each other variant: perplexity over its perplexity, recall less its recall."""
    made: dict[str, Figures] = {}
    for name in names:
        if name == "student":
            continue
        entry: Figures = {}
        for title, (rows, first, last) in ((t, r) for t, r in ranges(found).items() if name in places.get(t, {}).get("rows", {})):
            student, other = (sums[x].between(first, last)[rows] for x in ("student", name))
            told_ = figures(student, other, draws(rows, seed))
            entry[title] = {"value": told_["ratio"], "interval": told_["ratio_interval"]}
        pairs = [(r["scores"]["student"]["prompts"], r["scores"][name]["prompts"]) for r in recall if name in r["scores"]]
        if pairs:
            entry["recall"] = difference([x for a, _ in pairs for x in a], [x for _, b in pairs for x in b], seed)
        made[name] = entry
    return made


def targets(found: Mapping[str, Any]) -> Iterator[tuple[str, float, float, bool]]:
    """What a good student reaches: what, measured, bound, and whether it is reached."""
    places = found["text"]
    for key, title in (("first", f"first {SHORT:,}"), ("late", f"{FROM:,}-{LONG:,}")):
        if title in places:
            value = places[title]["rows"]["student"]["ratio"]
            yield f"perplexity at {title}, ratio to the teacher", value, TARGETS[key], value <= TARGETS[key]
    if grown := found["growth"].get("student"):
        yield "the same to 8,192, over that (lower bound)", grown["interval"][0], 1.0, grown["interval"][0] <= 1.0
    for task, length in (("pass-key", 4096), ("s-niah-2", 2048)):
        for row in found["recall"]:
            if (row["task"], row["length"]) == (task, length):
                value = row["scores"]["student"]["accuracy"]
                bound = TARGETS[task] * (row["scores"]["teacher"]["accuracy"] if task == "s-niah-2" else 1)
                yield f"{task} at {length:,}, share of the answer", value, bound, value >= bound


# ---- what is printed ----


def told(what: str, done: int, total: int) -> None:
    print(f"\r{what}: {done} of {total}   ", end="\n" if done == total else "", file=sys.stderr, flush=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(entry: Figures, digits: int = 3, scale: float = 1.0) -> str:
    low, high = (f"{scale * x:.{digits}f}" for x in entry["interval"] or (float("nan"),) * 2)
    return f"{scale * entry['value']:.{digits}f} [{low}, {high}]"


def pages(found: Mapping[str, Any]) -> Iterator[str]:
    """Markdown: text, recall, the student against each row, targets."""
    places, names = found["text"], found["names"]
    if places:
        rows = []
        for name in names:
            cells = []
            for place in places.values():
                own = place["rows"].get(name)
                if own is None:
                    cells.append("")
                    continue
                ratio = {"value": own["ratio"], "interval": own["ratio_interval"]}
                cells.append(f"{own['perplexity']:.2f}" if name == names[0] else spread(ratio))
            size, kl = found["state_bytes"][name], next(iter(places.values()))["rows"][name]["kl"]
            grown = [spread(found["growth"][name]) if name in found["growth"] else ""] if found["growth"] else []
            rows.append([name, "" if size is None else f"{size / 1e6:.2f} MB", *cells, *grown, f"{kl:.4f}"])
        heads = [f"{title} ({place['documents']})" for title, place in places.items()]
        heads += ["the last over the one before, same documents"] if found["growth"] else []
        yield "Perplexity of the first row, ratio to it of the others; documents in brackets\n\n" + table(
            ["model", "state", *heads, "KL, first 1,024"], rows
        )
    if found["recall"]:
        asked = [name for name in names if name in found["recall"][0]["scores"]]
        rows = []
        for row in found["recall"]:
            cells = []
            for name in asked:
                own = row["scores"].get(name)
                if own is None:
                    cells.append("")
                    continue
                low, high = own["interval"]
                cells.append(f"{100 * own['accuracy']:.0f} [{100 * low:.0f}, {100 * high:.0f}] / {100 * own['exact']:.0f}")
            rows.append([f"{row['task']} {row['length']:,}", *cells])
        yield f"Per cent of the answer [95%] / of whole answers, {found['recall'][0]['samples']} prompts each\n\n" + table(
            ["recall", *asked], rows
        )
    rows = []
    for name, entry in found["against"].items():
        cells = [spread(entry[title]) if title in entry else "" for title in places]
        rows.append([name, *cells, spread(entry["recall"], 1, 100) if "recall" in entry else ""])
    yield (
        "The student's perplexity over that of each row, and its recall less that row's, in points, all tasks; in pairs\n\n"
        + table(["against", *places, "recall"], rows)
    )
    lines = [[what, f"{value:.3f}", f"{bound:.3f}", "yes" if good else "NO"] for what, value, bound, good in targets(found)]
    yield table(["target", "measured", "bound", "reached"], lines)


# ---- the run ----


def control(directory: Path, dtype: str, device: str, like: torch.dtype) -> Variant:
    """A further checkpoint as a row of its own."""
    if (directory / MANIFEST).exists():
        model, _ = load(directory, dtype=dtype, device=device)
        mixers = [a.linearize for a in attentions(model)]
        size = state_of([m.spec for m in mixers], [m.shape for m in mixers], model.dtype.itemsize)
        return Variant(directory.name, model, state_bytes=size)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=like).to(pick_device(device)).eval()
    return Variant(directory.name, model)


def tasks(told_: str) -> list[tuple[str, int]]:
    """Tasks and lengths, as pass-key:4096,s-niah-2:2048."""
    found = [(task, int(length)) for task, length in (part.split(":") for part in told_.split(","))]
    if unknown := {task for task, _ in found} - {task for task, _ in RECALL}:
        raise argparse.ArgumentTypeError(f"no such task: {', '.join(sorted(unknown))}")
    return found


def off(told_: str) -> list[str]:
    """Rows without these parts, as far,slots."""
    rows = {"far": "student, far memory off", "window": "student, window off", "slots": "student, slots off"}
    if unknown := set(told_.split(",")) - rows.keys():
        raise argparse.ArgumentTypeError(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(rows)}")
    return [rows[part] for part in told_.split(",")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path)
    parser.add_argument("controls", type=Path, nargs="*")
    parser.add_argument("--data", default=BUILTIN)
    parser.add_argument("--held-out", type=int, help="per cent of the documents, by hash (default: what the stages held out)")
    parser.add_argument("--haystack", help="kind of text that needles lie in, a `source` of the data (default: all)")
    parser.add_argument("--documents", type=int, default=30, help="long documents read to 4,096")
    parser.add_argument("--longest", type=int, default=8, help="how many of them are read to 8,192")
    parser.add_argument("--segments", type=int, default=30, help="further documents of which 1,024 tokens are read")
    parser.add_argument("--prompts", type=int, default=20, help="of each task and length, in fives: one at each depth")
    parser.add_argument("--parts", default="text,recall")
    parser.add_argument(
        "--few", action="store_true", help="teacher, student and controls alone: nothing switched off, no bare window"
    )
    parser.add_argument("--beyond", type=off, default=[], help="what is switched off beyond 1,024 tokens too, as far,slots")
    parser.add_argument("--tasks", type=tasks, default=RECALL, help="what is asked, as pass-key:4096,s-niah-2:2048 (default: all)")
    parser.add_argument(
        "--fade-times", type=float, default=1.0, help="how many times as fast as made the student's learnt scores fade"
    )
    parser.add_argument("--teacher")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("fidelity.json"))
    return parser.parse_args()


def main() -> None:
    args, began = arguments(), time.monotonic()
    model, tokenizer = load(args.student, dtype=args.dtype, device=args.device)
    plan = model.config.linearize
    for score in (a.linearize.slot_score for a in attentions(model) if a.linearize.slot_score is not None):
        score.rate.data.mul_(args.fade_times)
    docs, what = measured_documents(plan, args.data, documents(args.data), args.held_out)
    host, note = teacher_host(model, plan, args.teacher, args.device)
    if host is None:
        sys.exit(note)
    variants = [v for v in variants_of(model, host) if not args.few or v.name in ("teacher", "student")]
    for directory in args.controls:
        if AutoTokenizer.from_pretrained(directory)(docs[0])["input_ids"] != tokenizer(docs[0])["input_ids"]:
            sys.exit(f"{directory}: another tokenizer, so its figures cannot be compared")
        variants.append(control(directory, args.dtype, args.device, model.dtype))
    kinds = kinds_of(args.data)
    chosen = passages(tokenizer, docs, kinds, args.documents, args.longest, args.segments)
    places, sums, recall = {}, dict[str, Sums](), list[dict[str, Any]]()
    same_bytes = [v.name for v in variants if v.name.endswith("alone")][-1:]
    rivals = {"teacher", "student", *same_bytes, *args.beyond, *(d.name for d in args.controls)}
    if "text" in args.parts:
        places, sums = measure_text(variants, chosen, rivals, args.seed)
    if "recall" in args.parts:
        essays = [doc for doc in docs if args.haystack in (None, kinds.get(doc))]
        asked = [*recalling(variants), *(v for v in variants if v.name in {d.name for d in args.controls})]
        window = max(a.linearize.spec.window for a in attentions(model))
        samples = max(args.prompts // len(DEPTHS), 1)
        recall = measure_recall(asked, tokenizer, essays, rivals, args.tasks, window, samples, args.seed)
    names, far = [v.name for v in variants], chosen.which(LONGEST)
    found = {
        "student": str(args.student), "data": what, "names": names, "state_bytes": {v.name: v.state_bytes for v in variants},
        "text": places, "text_hash": chosen.texts.hash(), "recall": recall,
        "growth": {n: growth(sums["teacher"], sums[n], far, args.seed) for n in names[1:] if far and n in sums and n in rivals},
        "against": against(places, sums, names, chosen, recall, args.seed), "environment": environment(model, args.seed),
        "seconds": round(time.monotonic() - began),
    }  # fmt: skip
    args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    size, how = sum(row.ids.numel() for row in chosen.texts.rows), f"{found['environment']['dtype']}, seed {args.seed}"
    print(f"{args.student}: {what}, {size:,} tokens of {len(chosen.kinds)} documents, {how}, {found['seconds']} s\n")
    print("\n\n".join(pages(found)))


if __name__ == "__main__":
    main()
