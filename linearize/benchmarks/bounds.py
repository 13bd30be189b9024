"""What bounds a run: how fast the machine multiplies, reads and calls, and how much of each the run takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from linearize.devices import fastest, matmul_rate, read_rate
from linearize.evaluation.reading import Reader, Variant
from linearize.evaluation.timing import Spread
from linearize.serving.int8 import Int8Linear
from linearize.testing.models import tiny_llama

SECONDS = 0.5  # that each measurement of the machine takes
MATRIX = 2048  # rows and columns of the products that are measured
ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which torch itself does not count
ON_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Work:
    """What a run does: floating-point operations of matrix products, operators called, bytes that it must read."""

    flops: float
    calls: int
    nbytes: float = 0.0


@dataclass(frozen=True)
class Machine:
    """FLOP/s of matrix products in `dtype`, bytes/s of reading, operators a second that a stock model's Python gets to call."""

    dtype: str
    threads: int
    matmul: float
    read: float
    calls: float

    @classmethod
    def measure(cls, dtype: torch.dtype, device: torch.device) -> Machine:
        """What it does when nothing else disturbs it."""
        return cls(
            str(dtype).removeprefix("torch."), torch.get_num_threads(), matmul_rate(dtype, device, MATRIX, SECONDS),
            read_rate(device, seconds=SECONDS), call_rate(dtype, device),
        )  # fmt: skip

    def best(self, other: Machine) -> Machine:
        """The faster of two measurements of each rate."""
        return replace(self, **{key: max(getattr(self, key), getattr(other, key)) for key in ("matmul", "read", "calls")})

    def limits(self, work: Work) -> dict[str, float]:
        """The seconds that each resource alone would take."""
        return {"matmul": work.flops / self.matmul, "memory": work.nbytes / self.read, "calls": work.calls / self.calls}


class Counter(TorchDispatchMode):
    """Counts the operators that are called while it is entered, and the floating-point operations of matrix products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops, self.calls = 0.0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        self.calls += 1
        if packet in (ON_CPU, ON_CPU_BACKWARD):
            self.flops += attention_flops(packet is ON_CPU_BACKWARD, args, kwargs or {})
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


def call_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operators a second when a model too small to compute anything says a token: Python and dispatch alone."""
    reader = Reader(Variant("", tiny_llama().to(device, dtype)))
    token = partial(reader, torch.ones(1, 1, dtype=torch.long))
    return counted(token).calls / fastest(token, device, SECONDS)


def attention_flops(backward: bool, args: Any, kwargs: Any) -> float:
    """Of softmax attention: 4 T S D a head, in a backward pass 10 T S D; half of it where the kernel leaves out what is masked."""
    if backward:
        grad, q, k, v = (x.shape for x in args[:4])
        causal = args[7] if len(args) > 7 else kwargs.get("is_causal", False)
        flops = sdpa_backward_flop_count(grad, q, *heads_of(q, k, v))
    else:
        q, k, v = (x.shape for x in args[:3])
        causal = args[4] if len(args) > 4 else kwargs.get("is_causal", False)
        flops = sdpa_flop_count(q, *heads_of(q, k, v))
    return float(flops / 2 if causal else flops)


def heads_of(q: torch.Size, k: torch.Size, v: torch.Size) -> tuple[tuple[int, ...], ...]:
    """Shapes of keys and values as if each query head had its own, as torch's formulas ask for."""
    return tuple((*x[:1], q[1], *x[2:]) for x in (k, v))


def counted(run: Callable[[], object], nbytes: float = 0.0) -> Work:
    """The work of one call, which also pays for what a first call pays for."""
    with Counter() as counter:
        run()
    return Work(counter.flops, counter.calls, nbytes)


def weight_bytes(model: Any) -> int:
    """Bytes of the parameters that every token's pass reads: all but an input embedding that is not the output head too."""
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight.data_ptr() == inputs.weight.data_ptr()
    apart = set() if tied else {id(p) for p in inputs.parameters()}
    small = [b for module in model.modules() if isinstance(module, Int8Linear) for b in module.buffers()]
    return sum(x.numel() * x.element_size() for x in (*model.parameters(), *small) if id(x) not in apart)


def row(name: str, seconds: Spread, work: Work, tokens: int, **facts: Any) -> dict[str, Any]:
    """One line of a benchmark."""
    return {
        "name": name, **facts, "tokens": tokens, "seconds": seconds.to_dict(), "tokens_per_second": tokens / seconds.median,
        "work": asdict(work),
    }  # fmt: skip


def bounded(one: dict[str, Any], machine: Machine) -> dict[str, Any]:
    """A row with the share of its time that each resource alone would take, and which would take most."""
    shares = {key: limit / one["seconds"]["median"] for key, limit in machine.limits(Work(**one["work"])).items()}
    return {**one, "bound": {**shares, "by": max(shares, key=lambda key: shares[key])}}
