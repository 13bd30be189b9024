"""How many processes a launcher meant to start, read from what it left in the environment: several forms start one in silence."""

from __future__ import annotations

from collections.abc import Mapping

from linearize.errors import ResourceError

JOINED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun's, which accelerate's launcher of many sets too
MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # these accelerate reads itself
FIX = "start it with: torchrun --nproc_per_node N -m linearize distill DIR (or linearize distill DIR --num-processes N)"


def meant(environment: Mapping[str, str]) -> int:
    """The number of processes that are to train together. ResourceError where each would train alone, or none could start."""
    sizes = [int(environment[name]) for name in ("WORLD_SIZE", *MPI_SIZES) if name in environment]
    if "SLURM_STEP_NUM_TASKS" in environment and int(environment["SLURM_STEP_NUM_TASKS"]) > 1 and not sizes:
        raise _alone(f"srun started {environment['SLURM_STEP_NUM_TASKS']} processes that do not know of each other")
    # accelerate launch --cpu --num_processes 2: an address to meet at, and one process that nobody will meet
    if "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment and not sizes:
        raise _alone("accelerate launch was asked for several processes and started one")
    if "WORLD_SIZE" in environment or "RANK" in environment:
        missing = [name for name in JOINED if name not in environment]
        if missing and (not sizes or max(sizes) > 1):
            raise _alone(f"the environment has some of a launcher's variables, but not {', '.join(missing)}")
    return max(sizes, default=1)


def check_joined(expected: int, joined: int) -> None:
    """ResourceError unless all processes that were meant train together."""
    if joined != expected:
        raise _alone(f"the launcher started {expected} processes, but only {joined} joined")


def _alone(what: str) -> ResourceError:
    return ResourceError(what, "distill", FIX)
