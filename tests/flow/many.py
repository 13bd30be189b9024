"""A stage of training in as many processes as this was launched in: python many.py FOLDER OUTPUT CASE..."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from linearize import text
from linearize.cli.exits import end
from linearize.conversion.blocks import checkpointed
from linearize.distillation import sharding
from linearize.distillation.collectives import leave
from linearize.distillation.loop import Trainer, make_accelerator
from linearize.distillation.run import train_stages
from linearize.loading import load
from linearize.methods.base import Stage

LENGTH, STEPS, ROWS = 32, 20, 2  # rows of a step, of all processes together
STAGES = {
    "attention": Stage("attention", LENGTH * ROWS * STEPS, lr=1e-2, loss="relative_mse + mse + 0.1*mass", far_weight=3.0),
    "lora": Stage("lora", LENGTH * ROWS * STEPS, lr=1e-2, mixer_lr=1e-2, rank=2, loss="kl + 0.5*ce"),
}


def rows() -> text.Packed:
    """Documents of 2 tokens in some rows and of 32 in others: a step's processes have 16 and 31 targets."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (LENGTH * 16,), generator=draw).tolist()
    lengths = [size for i in range(16) for size in ([2] * 16 if i % 3 else [32])]
    documents = [[ids.pop() for _ in range(size)] for size in lengths]
    return text.pack(documents, LENGTH)


def train(folder: Path, output: Path, case: str) -> None:
    """Write the parameters of CASE (stage-dtype and any of shard, checkpointing, bf16, parts) after all steps, and first gradients.

    In parts, processes share each row.
    """
    kind, dtype, *options = case.split("-")
    accelerator = make_accelerator("cpu")
    model, _ = load(folder, device="cpu")
    model = model.to(getattr(torch, dtype))
    processes, first = accelerator.num_processes, {}
    if "shard" in options:
        model = sharding.spread(model, accelerator.device, processes, "bfloat16" if "bf16" in options else None)
        assert sum(isinstance(module, FSDPModule) for module in model.modules()) == 3, "two layers, gathered apart, and the rest"
        held = sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor))
        assert held * processes == sum(p.numel() for name, p in model.named_parameters() if ".linearize." not in name)
    if "checkpointing" in options:
        checkpointed(model)
    real = Trainer._step

    def seen(self: Any, *args: Any) -> float:
        loss = real(self, *args)
        if not first:
            if "shard" in options:  # every moment is held by one process
                local = args[0].optim.state_dict()["state"]
                assert 0 < len(local) < sum(len(group["params"]) for group in self.groups)
            first.update({f"grad.{name}": p.grad.clone() for name, p in self.named.items() if p.grad is not None})
        return loss

    run = output / f"{case}-{accelerator.process_index}.run"
    Trainer._step = seen  # type: ignore[method-assign]
    try:
        run.mkdir(parents=True)
        own = {"batch": ROWS, "sequence_parallel": True} if "parts" in options else {"batch": ROWS // processes}
        made = train_stages(accelerator, model, [STAGES[kind]], lambda stage: rows(), run, {}, **own)
    finally:
        Trainer._step = real  # type: ignore[method-assign]
    if accelerator.is_main_process:
        found = {name: x.clone() for name, x in sharding.learned(made.model).items()}
        save_file({**found, **first}, output / f"{case}.safetensors")


if __name__ == "__main__":
    for name in sys.argv[3:]:
        train(Path(sys.argv[1]), Path(sys.argv[2]), name)
    leave()
    end(0)
