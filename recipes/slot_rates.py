"""How fast a learnt slot score should fade with age: KL of layers whose slots go by it, at several rates.

python recipes/slot_rates.py --data TEXT [--model smollm2] [--layers 7,8,18,20,23] [--rates 0,0.75,2,18] [--slots 512,1024]

One layer is swapped at a time; KL is the second-order form of `linearize convert --state-budget`, in nats a token at the end of
rows of up to 4,096 tokens of that text, and in brackets what an answer that must be recalled loses.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

from linearize.conversion import budget_costs
from linearize.conversion.budget import PLAIN, STORED, Choice
from linearize.conversion.budget_costs import Rows, measure_costs
from linearize.conversion.calibration import fit_scores
from linearize.conversion.calibration_text import CalibrationText, calibration_ids
from linearize.conversion.convert import attach, load_source
from linearize.conversion.plan import plan_for
from linearize.conversion.sources import resolve
from linearize.devices import DTYPES
from linearize.text import HELD_OUT_PERCENT


def measured(args: argparse.Namespace, points: list[dict[str, Any]]) -> list[Choice]:
    """Costs of every layer at each of these points, all on the same rows."""
    source = resolve(args.model)
    plan = plan_for(source, "default", args.layers, points[0], "calibrated")
    loaded, tokenizer = load_source(source, DTYPES[args.dtype], False)
    rows = Rows.of(calibration_ids(tokenizer, CalibrationText(args.data, args.held_out), plan))
    model = attach(loaded.eval(), plan.config_field())
    scores = fit_scores(model, rows.ids[rows.fitted], model.device, lambda *_, **__: None)
    with patch.object(budget_costs, "candidates", return_value=[("default", point) for point in points]):
        return measure_costs(model, plan, rows, scores, 0, lambda *_, **__: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="text to calibrate on (default: the built-in one)")
    parser.add_argument(
        "--held-out", type=int, default=HELD_OUT_PERCENT, help="per cent of its documents, by hash, that are left alone"
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--layers", default="7,8,18,20,23")
    parser.add_argument("--rates", default="0,0.75,2,18", help="nats in 1,024 tokens")
    parser.add_argument("--slots", default="512", help="of each kv head")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    args = parser.parse_args()
    every = product(map(int, args.slots.split(",")), map(float, args.rates.split(",")))
    points = [{**PLAIN, **STORED, "slots": slots, "slot_fade": rate} for slots, rate in every]
    found = measured(args, points)
    layers = list(dict.fromkeys(choice.layer for choice in found))
    print(f"| slots | rate | {' | '.join(f'layer {layer}' for layer in layers)} |")
    print("|---:" * (2 + len(layers)) + "|")
    for point in points:
        own = {choice.layer: choice for choice in found if choice.options == point}
        cells = (f"{own[layer].kl:.4f} ({own[layer].recall:.3f})" for layer in layers)
        print(f"| {point['slots']:,} | {point['slot_fade']:g} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
