"""Law 1 for the additive engine: reference == chunked at any chunk == folded steps, outputs and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from forms import DTYPES, STRENGTHS, compare, with_gradients
from torch import Tensor

from linearize.modeling.recurrence_additive import chunked, reference, step

CHUNKS = (0, 1, 3, 20)
LENGTHS = (1, 2, 3, 4, 5, 9, 13, 37)
DECAYS = ("none", "head", "channel")
Tensors = list[Tensor]


def random_stream(time: int, decay: str, lowest: float, dtype: torch.dtype) -> Tensors:
    """q (2, 3, 2, T, 5), k, v, log-decays in [lowest, 0] if there are any, and a state that is not empty."""
    q, k, v, state = (torch.randn(2, 3, *size, dtype=dtype) for size in ((2, time, 5), (time, 5), (time, 4), (5, 4)))
    sizes = {"none": None, "head": (time,), "channel": (time, 5)}[decay]
    gate = [] if sizes is None else [lowest * torch.rand(2, 3, *sizes, dtype=dtype)]
    return [q, k, v, state, *gate]


def folded(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(k.shape[2]):
        out, state = step(q[..., t, :], k[:, :, t], v[:, :, t], None if g is None else g[:, :, t], state)
        outputs.append(out)
    return torch.stack(outputs, -2), state


def evaluate(form, stream: Tensors, **options: int) -> dict[str, Tensor]:
    """Outputs, final state, and the gradients of a sum of both."""
    leaves = [x.clone().requires_grad_() for x in stream]
    q, k, v, state, *gate = leaves
    return with_gradients(form(q, k, v, gate[0] if gate else None, state, **options), dict(enumerate(leaves)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("decay", "strength"), [("none", "weak"), *itertools.product(DECAYS[1:], STRENGTHS)])
def test_forms_agree(decay: str, strength: str, dtype: torch.dtype) -> None:
    for time in LENGTHS:
        stream = random_stream(time, decay, STRENGTHS[strength], dtype)
        expected = evaluate(reference, stream)
        compare(evaluate(folded, stream), expected, f"{time} steps")
        for chunk in CHUNKS:
            compare(evaluate(chunked, stream, chunk=chunk), expected, f"{time} tokens in chunks of {chunk}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("decay", DECAYS)
def test_long_streams_agree(decay: str, strength: str, dtype: torch.dtype) -> None:
    """Several whole chunks, where cumulative log-decays are largest."""
    stream = random_stream(211, decay, STRENGTHS[strength], dtype)
    compare(evaluate(chunked, stream), evaluate(reference, stream), "211 tokens")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decay", DECAYS)
def test_terraced_forms_agree(decay: str, dtype: torch.dtype) -> None:
    """Blocks enter whole before their queries read; the same through calls of one block each."""
    for time, block in itertools.product(LENGTHS, (1, 4)):
        stream = random_stream(time, decay, -2.0, dtype)
        expected = evaluate(reference, stream, terraced=block)
        compare(evaluate(chunked, stream, terraced=block), expected, f"{time} tokens in blocks of {block}")
        q, k, v, state, *gate = stream
        outputs = []
        for at in range(0, time, block):
            piece = slice(at, at + block)
            g = gate[0][:, :, piece] if gate else None
            out, state = chunked(q[..., piece, :], k[:, :, piece], v[:, :, piece], g, state, terraced=block)
            outputs.append(out)
        compare({"output": torch.cat(outputs, -2), "state": state}, expected, f"{time} tokens, a call for each block of {block}")


@pytest.mark.parametrize("decay", DECAYS[1:])
def test_strong_decays_before_weak_ones(decay: str) -> None:
    """In one chunk, in fp32: differences of cumulative sums would lose the weak ones."""
    stream = random_stream(64, decay, -1.0, torch.float32)
    falling = 200.0 * torch.linspace(1, 0, 64) ** 6
    stream[-1] = -falling.view(64, *[1] * (stream[-1].dim() - 3)) * torch.rand_like(stream[-1])
    compare(evaluate(chunked, stream), evaluate(reference, stream), decay)


def test_exponents_never_overflow() -> None:
    """However strong the decay, nothing is clamped and nothing overflows, in fp32 too."""
    for decay in DECAYS[1:]:
        stream = random_stream(130, decay, -1e4, torch.float32)
        compare(evaluate(chunked, stream), evaluate(reference, stream), decay)
