"""What each stage costs, in forward passes of the teacher at the rate of this machine's matrix products: the plan's COSTS.

Run: python recipes/stage_costs.py [METHOD ...]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from linearize import text
from linearize.conversion.calibration_text import CalibrationText, calibration_ids
from linearize.conversion.convert import convert_in_memory, load_source
from linearize.conversion.estimates import COSTS, START, WITH_LOGITS, forward_flops
from linearize.conversion.plan import plan_for
from linearize.conversion.ranking import swap_costs
from linearize.conversion.sources import resolve
from linearize.devices import matmul_rate
from linearize.distillation.loop import make_accelerator
from linearize.distillation.lora import add_adapter
from linearize.distillation.run import SEQUENCE, stages_for
from linearize.distillation.stages import AttentionTransfer, LogitDistillation, mixer_parameters
from linearize.methods.base import CALIBRATED
from linearize.progress import silent

STEPS = 3
METHODS = ("default", "hedgehog", "gated-deltanet")


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def best(step: Callable[[torch.Tensor, torch.Tensor], float], rows: text.Packed) -> float:
    return min(seconds(lambda: step(rows.ids[:1], rows.positions[:1])) for _ in range(STEPS))


def costs(method: str) -> dict[str, float]:
    """Forward passes of each stage, a token; the best of a few steps, and the rate as measured beside them."""
    source, cpu = resolve("smollm2"), torch.device("cpu")
    plan = plan_for(source, method, None, {}, CALIBRATED)
    base, tokenizer = load_source(source, torch.float32)
    ids = calibration_ids(tokenizer, CalibrationText())
    found, rate = {}, matmul_rate(torch.float32, cpu)

    def note(kind: str, took: float, tokens: int) -> None:
        found[kind] = took * rate / tokens / forward_flops(plan, logits=kind in WITH_LOGITS)

    began = time.perf_counter()
    model, _ = convert_in_memory(base.eval(), plan, ids, 0, silent)
    note(START, time.perf_counter() - began, ids.numel())
    small = ids[:1, :128]
    note("rank", seconds(lambda: swap_costs(model, small)), small.numel() * (plan.total + 1))
    rows = text.pack([row.tolist() for row in ids], SEQUENCE)
    transfer, logits = stages_for(model.config.linearize, "all", None)
    for p in mixer_parameters(model).values():
        p.requires_grad_(True)
    note("attention", best(AttentionTransfer(model, transfer).backward, rows), SEQUENCE)
    model.requires_grad_(False)
    adapted = add_adapter(model, logits, 0)
    note("lora", best(LogitDistillation(make_accelerator("cpu"), adapted, adapted, logits, None).backward, rows), SEQUENCE)
    return found


if __name__ == "__main__":
    print(f"{'method':16} " + " ".join(f"{kind:>10}" for kind in COSTS))
    for method in sys.argv[1:] or METHODS:
        own = costs(method)
        print(f"{method:16} " + " ".join(f"{own[kind]:10.2f}" for kind in COSTS), flush=True)
    print(f"{'in the plan':16} " + " ".join(f"{cost:10.2f}" for cost in COSTS.values()))
