"""What the presses of kvpress keep of needles, in as many bytes as a student's state.

    python recipes/kvpress_needles.py write DIR --data TEXT --held-out 20 -o needles
    OTHER/bin/python recipes/kvpress_needles.py press needles --bytes 5e6

The first writes the prompts that `recipes/fidelity.py DIR` asks, of the same seed, and the teacher's weights. The second runs in an
environment of its own, where transformers is older than linearize needs: python -m venv OTHER, then
OTHER/bin/pip install torch==2.13.0 kvpress==0.5.5.

A press takes what comes before the question and keeps as many tokens as the bytes buy, keys and values in the model's dtype. By
`block` it sees 128 tokens more than it keeps at a time, as a stream would show them, though each token was computed with all before
it in sight, which a stream would not have; by `whole` it sees the text to its end. Scored as `fidelity.py` scores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

TASKS = "pass-key:1024,pass-key:2048,pass-key:4096,s-niah-2:1024,s-niah-2:2048"
PROMPTS, WEIGHTS = "prompts.json", "model"
PRESSES = ("StreamingLLM", "Knorm", "KeyDiff", "TOVA", "SnapKV", "LagKV", "ExpectedAttention")
ALIKE = ("StreamingLLM", "Knorm")  # a token's score, or place, does not depend on what else is there: blocks change nothing


def write(args: argparse.Namespace) -> None:
    """Prompts and the teacher's weights into a folder."""
    from fidelity import DEPTHS  # type: ignore[import-not-found]

    from linearize.conversion.teacher import teacher_host, unconverted
    from linearize.documents import documents
    from linearize.evaluation.recall import Grid, essay_of, prompts
    from linearize.loading import load
    from linearize.modeling.modeling_linearized import attentions
    from linearize.pipeline import measured_documents

    model, tokenizer = load(args.student)
    plan: Any = model.config.linearize
    host, note = teacher_host(model, plan, None, "cpu")
    if host is None:
        raise SystemExit(note)
    docs, what = measured_documents(plan, args.data, documents(args.data), args.held_out)
    essay, window = essay_of(tokenizer, docs), max(a.linearize.spec.window for a in attentions(model))
    rows = []
    for task, _, length in (one.partition(":") for one in args.tasks.split(",")):
        grid = Grid((task,), (int(length),), DEPTHS, max(args.prompts // len(DEPTHS), 1), args.seed)
        found = prompts(task, tokenizer, essay, int(length), grid, window)
        rows += [{"task": task, "length": int(length), "ids": one.ids, "told": one.told} for _, one in found]
    args.output.mkdir(parents=True)
    (args.output / PROMPTS).write_text(json.dumps({"data": what, "prompts": rows}), encoding="utf-8")
    stock = unconverted(host)
    del stock.config.linearize
    stock.save_pretrained(args.output / WEIGHTS)


def answered(model: Any, row: Mapping[str, Any], press: Any) -> float:
    """The share of a prompt's answer that the model writes where the press has thinned out what came before the question."""
    from contextlib import nullcontext

    from transformers import DynamicCache

    ids, told = torch.tensor([row["ids"]]), row["told"]
    start, first, cache = ids.shape[1] - len(told), told.index(True), DynamicCache()
    right = []
    with torch.no_grad():
        with nullcontext() if press is None else press(model):
            model(ids[:, :start], past_key_values=cache, logits_to_keep=1)
        said = ids[:, start : start + first]  # the question
        for i in range(first, len(told)):  # as a form is filled in: what is not asked for is given
            positions = torch.arange(start + i - said.shape[1], start + i)[None]
            out = model(said, position_ids=positions, past_key_values=cache, logits_to_keep=1)
            written, given = out.logits[:, -1].argmax(-1), ids[:, start + i]
            right += [bool(written == given)] if told[i] else []
            said = (written if told[i] else given)[:, None]
    return sum(right) / len(right)


def press_of(name: str, how: str, ratio: float) -> Any:
    import kvpress

    made = getattr(kvpress, f"{name}Press")(compression_ratio=ratio)
    return made if how == "whole" else kvpress.BlockPress(press=made, block_size=128)


def press(args: argparse.Namespace) -> None:
    """A table: a row a press, a column a task and length."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.needles / WEIGHTS, dtype="auto").eval()
    config, size = model.config, args.bytes
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kept = int(size // (2 * config.num_hidden_layers * config.num_key_value_heads * head * model.dtype.itemsize))
    rows = json.loads((args.needles / PROMPTS).read_text(encoding="utf-8"))["prompts"]
    columns = list(dict.fromkeys((row["task"], row["length"]) for row in rows))
    print(f"{kept} tokens a layer of {model.dtype}, {size / 1e6:.2f} MB\n")
    print("| press | " + " | ".join(f"{task} {length:,}" for task, length in columns) + " |\n|---|" + "---:|" * len(columns))
    names, ways = args.presses.split(","), args.ways.split(",")
    asked = [(name, how) for name in names for how in ways if how == "whole" or name not in ALIKE]
    for name, how in asked:
        shares: dict[tuple[str, int], list[float]] = {column: [] for column in columns}
        for row in rows:
            before = len(row["ids"]) - len(row["told"])
            own = None if before <= kept else press_of(name, how, 1 - (kept + 0.5) / before)
            shares[row["task"], row["length"]].append(answered(model, row, own))
        print(f"| {name} {how} | " + " | ".join(f"{100 * fmean(x):.0f}" for x in shares.values()) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    writes = commands.add_parser("write")
    writes.add_argument("student", type=Path)
    writes.add_argument("--data", default="builtin")
    writes.add_argument("--held-out", type=int)
    writes.add_argument("--tasks", default=TASKS)
    writes.add_argument("--prompts", type=int, default=20, help="of each task and length, in fives: one at each depth")
    writes.add_argument("--seed", type=int, default=0)
    writes.add_argument("-o", "--output", type=Path, required=True)
    writes.set_defaults(run=write)
    presses = commands.add_parser("press")
    presses.add_argument("needles", type=Path)
    presses.add_argument("--bytes", type=float, default=5e6)
    presses.add_argument("--presses", default=",".join(PRESSES))
    presses.add_argument("--ways", default="block,whole")
    presses.set_defaults(run=press)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
