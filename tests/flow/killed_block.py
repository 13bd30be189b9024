"""`linearize distill --stream-layers` that is killed: python killed_block.py BLOCK STEP ARGUMENTS... (BLOCK -1: never)."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from linearize.cli import run
from linearize.distillation import loop

BLOCK, STEP = map(int, sys.argv[1:3])
real = loop.Trainer._step


def dying(self: loop.Trainer, *args: Any) -> float:
    if (self.run.name, args[-1]) == (f"block-{BLOCK:03d}", STEP):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *args)


loop.Trainer._step = dying  # type: ignore[method-assign]
sys.exit(run(["distill", *sys.argv[3:]]))
