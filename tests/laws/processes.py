"""Run a function in several processes that form a gloo group, and bring back what each returns."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing


def _run(rank: int, world: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=120)  # a process that waits for a collective of no other fails instead of hanging
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=limit)
    torch.save(work(*arguments), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def together(world: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)`, a function of a module, returns in each of `world` processes."""
    folder.mkdir(parents=True, exist_ok=True)
    # forked, since importing torch and transformers anew would take each of them longer than most tests
    multiprocessing.start_processes(_run, (world, str(folder), work, arguments), nprocs=world, start_method="fork")
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]
