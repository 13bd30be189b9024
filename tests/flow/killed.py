"""`linearize distill` that is killed at a step: python killed.py RANK STAGE STEP ARGUMENTS... (RANK -1: never)."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from torch import distributed

from linearize.cli import run
from linearize.distillation import loop

VICTIM, STAGE, STEP = map(int, sys.argv[1:4])
real = loop.Trainer._step


def dying(self: loop.Trainer, *args: Any) -> float:
    if (self.accelerator.process_index, self.stage, args[-1]) == (VICTIM, STAGE, STEP):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *args)


loop.Trainer._step = dying  # type: ignore[method-assign]
code = run(["distill", *sys.argv[4:]])
assert code or not distributed.is_initialized(), "the processes did not part together"
sys.exit(code)
