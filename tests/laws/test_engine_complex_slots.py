"""Law 1 for the complex and the slots engine: reference == chunked at any chunk == folded steps, outputs and gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from types import ModuleType

import pytest
import torch
from forms import DTYPES, STRENGTHS, compare, evaluate
from torch import Tensor

from linearize.modeling import recurrence_complex, recurrence_slots
from linearize.testing.laws import EXACT

CHUNKS = (0, 1, 3, 20)
LENGTHS = (1, 2, 3, 5, 9, 13, 37)
Tensors = list[Tensor]
Random = Callable[[int, float, torch.dtype], Tensors]


def complex_stream(time: int, lowest: float, dtype: torch.dtype) -> Tensors:
    """q (2, 3, 2, T, 5), k, v, log-magnitudes in [lowest, 0] and angles of a few radians, and a state that is not empty."""
    q, k, v, state = (torch.randn(2, 3, *size, dtype=dtype) for size in ((2, time, 5), (time, 5), (time, 4), (10, 4)))
    magnitude, angle = lowest * torch.rand(2, 3, time, 5, dtype=dtype), 2 * torch.randn(2, 3, time, 5, dtype=dtype)
    return [q, k, v, torch.cat([magnitude, angle], -1), state]


def slots_stream(time: int, lowest: float, dtype: torch.dtype) -> Tensors:
    """q (2, 3, 2, T, 5), k, v, writes in [0, 1], log-decays in [lowest, 0] of 6 slots, and a state that is not empty."""
    q, k, v, state = (torch.randn(2, 3, *size, dtype=dtype) for size in ((2, time, 5), (time, 5), (time, 4), (6, 9)))
    s, g = torch.rand(2, 2, 3, time, 6, dtype=dtype)
    return [q, k, v, s, lowest * g, state]


ENGINES = {"complex": (recurrence_complex, complex_stream), "slots": (recurrence_slots, slots_stream)}
each_engine = pytest.mark.parametrize(("engine", "random_stream"), ENGINES.values(), ids=ENGINES)


def cut(stream: Tensors, piece: slice | int) -> Tensors:
    """The tokens of that piece, without the state."""
    return [x[..., piece, :] for x in stream[:-1]]


def folded(engine: ModuleType, *stream: Tensor) -> tuple[Tensor, Tensor]:
    outputs, state = [], stream[-1]
    for t in range(stream[0].shape[-2]):
        out, state = engine.step(*cut(list(stream), t), state)
        outputs.append(out)
    return torch.stack(outputs, -2), state


def calls(engine: ModuleType, stream: Tensors, ends: list[int], **options: int) -> dict[str, Tensor]:
    """Calls up to each of `ends`, with the state carried."""
    outputs, state = [], stream[-1]
    for start, stop in itertools.pairwise([0, *ends]):
        out, state = engine.chunked(*cut(stream, slice(start, stop)), state, **options)
        outputs.append(out)
    return {"output": torch.cat(outputs, -2), "state": state}


@each_engine
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strength", STRENGTHS)
def test_forms_agree(engine: ModuleType, random_stream: Random, strength: str, dtype: torch.dtype) -> None:
    for time in LENGTHS:
        stream = random_stream(time, STRENGTHS[strength], dtype)
        expected = evaluate(engine.reference, stream)
        compare(evaluate(partial(folded, engine), stream), expected, f"{time} steps")
        for chunk in CHUNKS:
            compare(evaluate(engine.chunked, stream, chunk=chunk), expected, f"{time} tokens in chunks of {chunk}")


@each_engine
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strength", STRENGTHS)
def test_long_streams_agree(engine: ModuleType, random_stream: Random, strength: str, dtype: torch.dtype) -> None:
    """Several whole chunks, where cumulative log-decays are largest; in one call and in two."""
    stream = random_stream(211, STRENGTHS[strength], dtype)
    expected = evaluate(engine.reference, stream)
    compare(evaluate(engine.chunked, stream), expected, "211 tokens")
    compare(calls(engine, stream, [75, 211]), expected, "211 tokens in two calls")


@each_engine
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_terraced_forms_agree(engine: ModuleType, random_stream: Random, dtype: torch.dtype) -> None:
    """Blocks enter whole before their queries read; the same through calls of one block each."""
    for time, block in itertools.product(LENGTHS, (1, 4)):
        stream = random_stream(time, -2.0, dtype)
        expected = evaluate(engine.reference, stream, terraced=block)
        compare(evaluate(engine.chunked, stream, terraced=block), expected, f"{time} tokens in blocks of {block}")
        ends = [min(at + block, time) for at in range(0, time, block)]
        compare(calls(engine, stream, ends, terraced=block), expected, f"{time} tokens, a call for each block of {block}")


@each_engine
def test_exponents_never_overflow(engine: ModuleType, random_stream: Random) -> None:
    """However strong the decay, nothing is clamped and nothing overflows, in fp32 too."""
    stream = random_stream(130, -1e4, torch.float32)
    found, expected = evaluate(engine.chunked, stream), evaluate(engine.reference, stream)
    if engine is recurrence_complex:
        for each in (found, expected):
            each["gradient 3"], each["of angles"] = each["gradient 3"].chunk(2, -1)
        # a memory that keeps almost nothing has almost no gradient of angles: the rounding is measured against that of keys
        error = (found.pop("of angles") - expected["of angles"]).norm()
        assert error <= EXACT[torch.float32] * expected["gradient 1"].norm()
    compare(found, expected, "130 tokens")


@each_engine
def test_pads_change_nothing(engine: ModuleType, random_stream: Random) -> None:
    """Tokens that write nothing and decay nothing may stand anywhere."""
    stream = random_stream(13, -2.0, torch.float64)
    pad, writes = torch.arange(13) % 3 == 0, 3 if engine is recurrence_slots else 1
    stream[writes][:, :, pad], stream[-2][:, :, pad] = 0.0, 0.0
    out, last = engine.chunked(*stream)
    own, expected = engine.chunked(*(x[..., ~pad, :] for x in stream[:-1]), stream[-1])
    compare({"output": out[..., ~pad, :], "state": last}, {"output": own, "state": expected}, "pads")


def test_empty_slots_read_as_zero() -> None:
    *stream, state = slots_stream(13, -2.0, torch.float64)
    stream[3][:, :, 0] = 0.0
    assert not recurrence_slots.chunked(*stream, torch.zeros_like(state))[0][..., 0, :].any()


@torch.no_grad()
def test_late_angles_are_exact() -> None:
    """64k tokens on, fp32 angles have lost nothing."""
    time = 2**16
    q, k, v, angle, state = (torch.randn(1, 1, *size) for size in ((1, time, 2), (time, 2), (time, 2), (time, 2), (4, 2)))
    stream = [q, k, v, torch.cat([torch.full_like(angle, -1e-3), angle + 1], -1), state]
    (out, last), (wide, expected) = (recurrence_complex.chunked(*own) for own in (stream, [x.double() for x in stream]))
    late = slice(time - 1000, time)
    compare({"output": out[..., late, :], "state": last}, {"output": wide.float()[..., late, :], "state": expected.float()}, "late")
