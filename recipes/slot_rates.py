"""How fast a learnt slot score should fade with age: KL of layers whose slots go by it, at several rates.

python recipes/slot_rates.py --data TEXT [--model smollm2] [--layers 7,8,18,20,23] [--rates 0,0.75,2,18] [--slots 512]

One layer is swapped at a time; KL is the second-order form of `linearize convert --state-budget`, in nats a token at the end of
rows of up to 4,096 tokens of that text, and in brackets what an answer that must be recalled loses.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch

from linearize.conversion import budget_costs
from linearize.conversion.budget import PLAIN, STORED, Choice
from linearize.conversion.budget_costs import Rows, measure_costs
from linearize.conversion.calibration import fit_scores
from linearize.conversion.convert import attach, calibration_ids, load_source
from linearize.conversion.plan import plan_for
from linearize.conversion.sources import resolve


def measured(args: argparse.Namespace) -> Iterator[tuple[float, list[Choice]]]:
    """Costs of every layer at each rate, all on the same rows."""
    source, options = resolve(args.model), {**PLAIN, **STORED, "slots": args.slots}
    plan = plan_for(source, "default", args.layers, options, "calibrated")
    loaded, tokenizer = load_source(source, torch.bfloat16, False)
    rows = Rows.of(calibration_ids(tokenizer, args.data, plan, args.held_out))
    model = attach(loaded.eval(), plan.config_field())
    scores = fit_scores(model, rows.ids[rows.fitted], model.device, lambda *_, **__: None)
    for rate in map(float, args.rates.split(",")):
        with patch.object(budget_costs, "candidates", return_value=[("default", {**options, "slot_fade": rate})]):
            yield rate, measure_costs(model, plan, rows, scores, 0, lambda *_, **__: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="text to calibrate on (default: the built-in one)")
    parser.add_argument("--held-out", type=int, help="per cent of its documents, by hash, that are left alone")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--layers", default="7,8,18,20,23")
    parser.add_argument("--rates", default="0,0.75,2,18", help="nats in 1,024 tokens")
    parser.add_argument("--slots", type=int, default=512)
    args = parser.parse_args()
    print(f"| rate | {' | '.join(f'layer {layer}' for layer in args.layers.split(','))} |")
    print("|---:" * (1 + len(args.layers.split(","))) + "|")
    for rate, choices in measured(args):
        print(f"| {rate:g} | {' | '.join(f'{c.kl:.4f} ({c.recall:.3f})' for c in choices)} |", flush=True)


if __name__ == "__main__":
    main()
