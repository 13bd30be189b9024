"""The kernel for rotary position embeddings: what PyTorch computes in float64, in the mixers and in the models' own attention."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from called_kernels import needs_kernels, recorded
from torch import Tensor, nn
from transformers.models.cohere.modeling_cohere import CohereAttention
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from linearize import convert_model
from linearize.modeling import native_ops
from linearize.modeling.modeling_linearized import attentions, mode
from linearize.modeling.rope import fused, in_one_pass, pairs_halves, rotate, unrotate
from linearize.testing.families import tiny_family
from linearize.testing.laws import EXACT, assert_close


@pytest.fixture(autouse=True)
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are called."""
    return recorded(monkeypatch)


def turn(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """By PyTorch, channels after those that turn as they are."""
    if inverse:
        return unrotate(x, cos, sin)
    own, width = x[..., : cos.shape[-1]], cos.shape[-1]
    return torch.cat([own * cos[:, None] + rotate(own, "half") * sin[:, None], x[..., width:]], dim=-1)


def gradients(turned: Any, x: Tensor, *given: Any) -> list[Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = turned(x, *given)
    slopes = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).sin().view_as(y)
    return [y.detach(), *torch.autograd.grad((y * slopes).sum(), x)]


@needs_kernels
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dim, width", [(32, 32), (72, 64), (64, 32)])
def test_rotation(dim: int, width: int, inverse: bool, called: list[str]) -> None:
    """Angles of one text or of each, and halves that differ: gradients then need the other half's."""
    for time, texts in itertools.product((1, 2, 17, 40), (1, 2)):
        x = torch.randn(2, time, 3, dim).transpose(1, 2)  # as projections leave it
        cos, sin = torch.rand(texts, time, width) + 0.2, torch.randn(texts, time, width)
        expected = gradients(turn, x.double(), cos.double(), sin.double(), inverse)
        for part, other in zip(gradients(native_ops.rope, x, cos, sin, inverse), expected, strict=True):
            assert_close(part, other, EXACT[torch.float32], f"{time} tokens")
    assert set(called) == {"rope"}


@needs_kernels
def test_who_is_turned_by_the_kernel(called: list[str]) -> None:
    x, cos = torch.randn(2, 3, 5, 64), torch.randn(2, 5, 64)
    assert fused(x, cos, cos)
    for own, angles in (
        (x, cos[..., :48]),
        (x[..., :32], cos),
        (x.double(), cos),
        (x, cos[:, None]),
        (x, cos.clone().requires_grad_()),
    ):
        assert not fused(own, angles, angles)
    assert not fused(x[:1].expand(3, -1, -1, -1), cos, cos)
    unrotate(x, cos, cos, "paired")
    assert not called
    unrotate(x, cos, cos, "half")
    assert called == ["rope"]


def test_a_rotation_is_asked_what_it_does() -> None:
    def neighbours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return tuple(x * cos[:, None] + rotate(x, "paired") * sin[:, None] for x in (q, k))

    def refuses(*_: Tensor) -> None:
        raise TypeError("more is asked for")

    assert pairs_halves(apply_rotary_pos_emb)
    assert not pairs_halves(neighbours)
    assert not pairs_halves(refuses)
    assert in_one_pass(CohereAttention) is CohereAttention  # pairs neighbours
    assert in_one_pass(nn.Linear) is nn.Linear
    made = in_one_pass(LlamaAttention)
    assert issubclass(made, LlamaAttention)
    assert made.forward is not LlamaAttention.forward


@needs_kernels
@pytest.mark.parametrize("which", ["student", "observe"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_a_models_own_rotation(family: str, which: str, monkeypatch: pytest.MonkeyPatch, called: list[str]) -> None:
    """Logits and the gradients of what projects, with kernels and without; several texts of different lengths."""
    model = convert_model(tiny_family(family, head_dim=32), method="default").float()
    ids = torch.randint(2, 97, (2, 30), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    found = []
    for backend in ("native", "torch"):
        monkeypatch.setenv("LINEARIZE_BACKEND", backend)
        called.clear()
        with mode(model, which):
            logits = model(**given).logits[mask.bool()]
        weights = [attention.q_proj.weight for attention in attentions(model)]
        found.append([logits.detach(), *torch.autograd.grad(logits.square().mean(), weights)])
        assert ("rope" in called) == (backend == "native")
    for own, other in zip(*found, strict=True):
        assert_close(own, other, 1e-4, family)
