"""Weights in 8 bits for decoding: half the bytes to read for each token; a kernel multiplies them as they are.

torchao's weight-only form is made for compiled code: called directly it took 2.8 times as long as bf16. Where there are no kernels
of ours PyTorch's own does it, which is fast where what it multiplies is bf16: in fp32 it takes ten times as long.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from linearize.errors import UsageError
from linearize.modeling.native_operators import FEW, matvec, takes_few
from linearize.modeling.one_pass import OnePassLinear

LARGEST = 127


class Int8Linear(nn.Module):
    """y = s (x W^T) + b with W (N, K) in int8 and a scale s (N,) in bf16 for each row, the row's largest weight over 127.

    Without kernels, x of up to `FEW` tokens is rounded to bf16, which is as coarse as the weights are. Of more tokens a product
    in the layer's own dtype is faster.
    """

    reads_few = True
    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(1).clamp(min=1e-30) / LARGEST).to(torch.bfloat16)
        steps = (weight / scale.float()[:, None]).round().clamp(-LARGEST, LARGEST)
        self.register_buffer("weight", steps.to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias: nn.Parameter | None = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if takes_few(x, self.weight, others=(self.bias,)):
            return matvec(x, self.weight, self.bias, self.scale)
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) > FEW:
            return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale[:, None].to(x.dtype), self.bias)
        y = torch._weight_int8pack_mm(rows.to(torch.bfloat16), self.weight, self.scale).view(*x.shape[:-1], -1).to(x.dtype)
        return y if self.bias is None else y + self.bias


def quantize(model: Any) -> None:
    """Put all linear layers of a model in 8 bits, in place; embeddings and mixers stay. UsageError off the CPU, or without any."""
    if model.device.type != "cpu":
        raise UsageError(f"weights in 8 bits run on a CPU, and the model is on {model.device.type}", "--int8", "--device cpu")
    found = [(name, module) for name, module in model.named_modules() if type(module) in (nn.Linear, OnePassLinear)]
    if not found:
        raise UsageError("this model has no linear layers that could be put in 8 bits", "--int8", "leave --int8 out")
    for name, module in found:
        model.set_submodule(name, Int8Linear(module))
