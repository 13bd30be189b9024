"""Training spread over processes: FSDP2 shards the frozen network, ZeRO the optimizer's moments; what is trained is whole.

Mixers and adapters are a few percent of a model, and their gradients come from one backward pass a layer inside the forward
pass, where FSDP's own reduction would not see them: every process keeps them whole and averages their gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linearize.conversion.blocks import blocks, checkpointed
from linearize.devices import DTYPES, pick_dtype
from linearize.distillation import lora
from linearize.errors import UsageError
from linearize.loading import load
from linearize.opening import check

COMMAND = "linearize distill DIR --shard --num-processes 2"


def opened(
    directory: Path, device: torch.device, processes: int, *, shard: bool, precision: str | None, gradient_checkpointing: bool
) -> Any:
    """The model of a checkpoint, ready to train. UsageError for a precision without sharding."""
    if precision and not shard:
        raise UsageError("the precision of gathered weights needs sharded ones", "--mixed-precision", COMMAND)
    model = load_to_shard(directory, device) if shard else load(directory, device=str(device))[0]
    if shard:
        model = spread(model, device, processes, precision)
    if gradient_checkpointing:
        checkpointed(model)
    return model


def load_to_shard(directory: Path, device: torch.device) -> Any:
    """The model on the CPU, in the dtype that `device` would have them in: no device ever holds the whole."""
    dtype = pick_dtype("auto", check(directory).get("dtype", "float32"), device)
    return load(directory, dtype=str(dtype).removeprefix("torch."), device="cpu")[0]


def spread(model: Any, device: torch.device, processes: int, precision: str | None = None) -> Any:
    """The model, its frozen parameters spread over all processes a layer at a time; mixers stay whole, on `device`.

    `precision` (bfloat16) is that of the gathered weights and of the activations; mixers keep theirs. UsageError for one process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if processes < 2:
        raise UsageError("one process has nothing to share its weights with", "--shard", COMMAND)
    mesh = init_device_mesh(device.type, (processes,))
    policy = MixedPrecisionPolicy(param_dtype=DTYPES[precision]) if precision else MixedPrecisionPolicy()
    model.requires_grad_(False)
    whole = set()
    for name, module in model.named_modules():
        if name.endswith(".linearize"):
            whole |= set(module.to(device).parameters())
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=whole)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=whole)
    return model


def is_sharded(model: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def make_optimizer(groups: list[dict[str, Any]], sharded: bool) -> torch.optim.Optimizer:
    """AdamW; `sharded` gives each process the moments of a part of the parameters (ZeRO stage 1, Rajbhandari et al. 2020)."""
    if not sharded:
        return torch.optim.AdamW(groups, weight_decay=0.0)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(groups, optimizer_class=torch.optim.AdamW, weight_decay=0.0)


def gather_moments(optimizer: torch.optim.Optimizer) -> None:
    """Bring sharded moments to the first process, which writes them; every process calls this."""
    if hasattr(optimizer, "consolidate_state_dict"):
        optimizer.consolidate_state_dict(to=0)


def unsharded(model: Any, directory: Path, device: torch.device) -> Any:
    """A whole model on the CPU with what `model` learned: the frozen weights are read again, so that nothing is gathered."""
    fresh = load_to_shard(directory, device)
    if hasattr(model, "peft_config"):
        fresh = lora.like(fresh, model)
    own = dict(fresh.named_parameters())
    for name, x in learned(model).items():
        own[name].data.copy_(x)
    return fresh


def learned(model: nn.Module) -> Mapping[str, Tensor]:
    """The parameters that stages train: mixers and adapters."""
    return {name: p.data for name, p in model.named_parameters() if ".linearize." in name or "lora_" in name}
