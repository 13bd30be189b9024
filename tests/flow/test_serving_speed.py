"""What serving does to be quick changes nothing but time, or says by how much: the nucleus, weights in 8 bits, oneDNN's switch."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn
from transformers.generation.logits_process import TopPLogitsWarper

from linearize.errors import UsageError
from linearize.modeling import matvec, native
from linearize.modeling.native_operators import FEW
from linearize.serving import nucleus
from linearize.serving.int8 import Int8Linear, quantize
from linearize.serving.nucleus import Nucleus
from linearize.testing import linearized, method_points, tiny_llama
from linearize.testing.laws import deviation


@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("size", [7, 300])
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_nucleus_is_transformers_own(top_p: float, size: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nucleus, "LIKELIEST", 20)
    scores = scale * torch.randn(5, size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Nucleus(top_p)(scores, scores), TopPLogitsWarper(max(top_p, 1e-9))(scores, scores))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, FEW, FEW + 1, 40])
@pytest.mark.parametrize("backend", ["auto", "torch"])
@torch.no_grad()
def test_int8_products(backend: str, bias: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows and many, through the kernels or not, multiply the same rounded weights, which are within half a step of the own."""
    monkeypatch.setenv("LINEARIZE_BACKEND", backend)
    torch.manual_seed(0)
    linear = nn.Linear(64, 96, bias=bias)
    quick, x = Int8Linear(linear), torch.randn(2, rows, 64)[:1]
    rounded = quick.weight.float() * quick.scale[:, None]
    assert bool(((rounded - linear.weight).abs() <= 0.501 * quick.scale[:, None]).all())
    few, found = rows <= FEW and (backend == "torch" or native.library() is None), quick(x)
    product = nn.functional.linear(x.to(torch.bfloat16).float() if few else x, rounded)
    expected = product if linear.bias is None else product + linear.bias
    if few:  # by PyTorch's kernel: what goes in and what comes out is bf16: within half a unit in its last place
        assert bool(((found - expected).abs() <= 2**-8 * product.abs() + 1e-5).all())
    else:
        assert deviation(found, expected) < 1e-5
    assert found.dtype == x.dtype
    assert quick.weight.dtype == torch.int8


def test_int8_model() -> None:
    model = linearized(tiny_llama(), method_points()[0].spec)
    ids = torch.randint(2, 64, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).logits
        quantize(model)
        assert 0 < deviation(model(ids).logits, before) < 0.1
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    with pytest.raises(UsageError, match="no linear layers"):
        quantize(model)


class Switch:
    """Stands for torch.backends.mkldnn."""

    enabled = True


def test_one_row_switches_onednn_off_while_it_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    switch = Switch()
    monkeypatch.setattr(torch.backends, "mkldnn", switch)
    weight, one, many = torch.zeros(4, 4, dtype=torch.bfloat16), torch.zeros(1, 1), torch.zeros(1, 9)
    for tokens, kind, off in ((one, weight, True), (many, weight, False), (one, weight.float(), False)):
        with matvec.products(kind, tokens):
            assert switch.enabled != off
        assert switch.enabled
    with pytest.raises(ZeroDivisionError), matvec.products(weight, one):
        raise ZeroDivisionError
    assert switch.enabled
    seen: list[bool] = []

    def other() -> None:
        with matvec.products(weight, many):
            seen.append(switch.enabled)

    with matvec.products(weight, one):
        worker = threading.Thread(target=other)
        worker.start()
        worker.join()
    assert seen == [True]
    assert switch.enabled
    switch.enabled = False  # somebody else's choice stays
    with matvec.products(weight, one):
        pass
    assert not switch.enabled


def test_a_step_in_bf16_is_the_same_either_way() -> None:
    """Both kernels accumulate in fp32: one token's logits differ by the rounding of outputs to bf16."""
    model: Any = linearized(tiny_llama(), method_points()[0].spec).to(torch.bfloat16)
    ids = torch.randint(2, 64, (1, 1), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        quick = model(ids).logits
        assert deviation(quick, model(ids.repeat(3, 1)).logits[:1]) < 2.0**-6
