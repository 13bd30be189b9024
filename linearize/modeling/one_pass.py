"""Norms, gated feed-forward layers and products of few rows of a model in one pass over memory each, where there are kernels.

PyTorch takes seven for a norm and two for a gate, and reads weights for one row at a third of memory's speed. Which of a model's
modules are norms and gates is asked, not read: one like it, with other weights, has to give what the equation gives, to the bit.
"""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any

try:
    import torch
    from torch import Tensor, nn
    from torch.nn.functional import linear, silu
except ImportError as error:
    raise ImportError("linearize models need torch") from error

from .native import WIDTH
from .native_model import rms_norm, swiglu, takes_own
from .native_operators import feed_forward, matvec, takes_few

GATED = ("gate_proj", "up_proj", "down_proj")
PROBE = 32  # numbers


class OnePass(nn.Module):
    """What takes one pass; `linearize_plain` while the model runs as its teacher, which is what was converted to the bit."""

    linearize_plain = False


class OnePassNorm(OnePass):
    """Mixed in before a class of RMS norms."""

    def forward(self, x: Tensor) -> Any:
        weight: Any = self.weight
        if self.linearize_plain or weight is None or not takes_own(x, weight):
            return super().forward(x)
        return rms_norm(x, weight, epsilon(self))


class OnePassGate(OnePass):
    """Mixed in before a class of feed-forward layers down(silu(gate(x)) up(x))."""

    def forward(self, x: Tensor) -> Any:
        own: Any = self
        if self.linearize_plain:
            return super().forward(x)
        parts = [own._modules[name] for name in GATED]
        if all(map(_bare, parts)):
            weights = tuple(part.weight for part in parts)
            if len(weights[0]) % WIDTH == 0 and takes_few(x, *weights):
                return feed_forward(x, weights, tuple(getattr(part, "scale", None) for part in parts))
        if not takes_own(x):  # what gradients are wanted of, or is traced, stays as it was
            return super().forward(x)
        gate, up = own.gate_proj(x), own.up_proj(x)
        return own.down_proj(swiglu(gate, up) if takes_own(gate, up) else own.act_fn(gate) * up)


class OnePassLinear(OnePass, nn.Linear):
    """A linear layer that reads its weights once where rows are few."""

    reads_few = True

    def forward(self, x: Tensor) -> Any:
        if self.linearize_plain or not takes_few(x, self.weight, others=(self.bias,)):
            return super().forward(x)
        return matvec(x, self.weight, self.bias)


def untouched(module: Any) -> bool:
    """Whether a module is called as its class says, and nobody wants to know of its calls."""
    own = module.__dict__
    return not ("forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"])


def _bare(layer: Any) -> bool:
    """Whether its weights are all there is to a linear layer."""
    return getattr(layer, "reads_few", False) and layer.bias is None and untouched(layer)


def in_one_pass(model: nn.Module) -> None:
    """Let norms, gates and linear layers of a model take one pass, in place; whatever else it has stays as it is."""
    known: dict[tuple[str, ...], type[nn.Module]] = {}
    modules: list[Any] = list(model.modules())
    for module in modules:
        kind = type(module).__module__, type(module).__qualname__, type(module._modules.get("act_fn")).__qualname__
        if kind not in known:
            known[kind] = _in_one_pass(module)
        if known[kind] is not type(module):
            module.__class__ = known[kind]


def _in_one_pass(module: nn.Module) -> type[nn.Module]:
    """A subclass of a module's class that takes one pass, or that class itself."""
    if type(module) is nn.Linear:
        return OnePassLinear
    if not isinstance(module, OnePass):
        for mixin, is_such in ((OnePassNorm, normalises), (OnePassGate, gates)):
            if is_such(module):
                return joined(type(module), mixin)
    return type(module)


def epsilon(norm: Any) -> float:
    """What a norm adds to the mean square; nan where it says nothing of it."""
    found = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return found if isinstance(found, float) else math.nan


def normalises(module: nn.Module) -> bool:
    """Whether it computes w (x / sqrt(mean x^2 + eps)), the bracket in float32 and then rounded."""
    if list(module._parameters) != ["weight"] or module._modules or module._buffers or math.isnan(epsilon(module)):
        return False
    return _answers(module, norm_wanted, with_weight)


def gates(module: nn.Module) -> bool:
    """Whether it computes down(silu(gate(x)) up(x))."""
    children = dict(module.named_children())
    if set(children) != {*GATED, "act_fn"} or module._parameters or module._buffers:
        return False
    linears = all(type(children[name]) in (nn.Linear, OnePassLinear) for name in GATED)
    return linears and _answers(module, gate_wanted, with_products)


# ---- asking ----


def numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    """The same at every call, whatever the device that modules are being made on."""
    size = int(torch.Size(shape).numel())
    return torch.arange(size, dtype=torch.float64, device="cpu").mul_(1.7).sin_().mul_(2).to(dtype).view(shape)


def _answers(module: nn.Module, wanted: Any, prepared: Any) -> bool:
    """Whether a module like this one, with weights of its own, gives what is `wanted` in both dtypes that kernels know."""
    for dtype in (torch.float32, torch.bfloat16):
        probe = copy.copy(module)
        prepared(probe, dtype)
        x = numbers(2, 3, PROBE, dtype=dtype)
        try:
            with torch.no_grad():
                found = probe.forward(x)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
            return False
        if not isinstance(found, Tensor) or found.dtype != dtype or not torch.equal(found, wanted(probe, x)):
            return False
    return True


def with_weight(probe: Any, dtype: torch.dtype) -> None:
    probe._parameters = {"weight": nn.Parameter(numbers(PROBE, dtype=dtype), requires_grad=False)}


def norm_wanted(probe: Any, x: Tensor) -> Tensor:
    wide = x.float()
    found: Tensor = probe.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon(probe))).to(x.dtype)
    return found


def with_products(probe: Any, dtype: torch.dtype) -> None:
    probe._modules = dict(probe._modules)
    for name, (out, into) in zip(GATED, ((2 * PROBE, PROBE), (2 * PROBE, PROBE), (PROBE, 2 * PROBE)), strict=True):
        probe._modules[name] = of_numbers(out, into, dtype=dtype)


def of_numbers(out: int, into: int, *, dtype: torch.dtype, biased: bool = False) -> nn.Linear:
    """A linear layer with such weights."""
    layer = copy.copy(_empty())
    layer.in_features, layer.out_features = into, out
    made = [numbers(out, into, dtype=dtype), numbers(out, dtype=dtype) if biased else None]
    parameters = [None if x is None else nn.Parameter(x, requires_grad=False) for x in made]
    layer._parameters = dict(zip(("weight", "bias"), parameters, strict=True))
    return layer


@cache
def _empty() -> nn.Linear:
    """A linear layer is made once: its first weights would take as long as all that is asked."""
    return nn.Linear(1, 1, device="meta")


def gate_wanted(probe: Any, x: Tensor) -> Tensor:
    return linear(silu(linear(x, probe.gate_proj.weight)) * linear(x, probe.up_proj.weight), probe.down_proj.weight)


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def joined(base: type[nn.Module], mixin: type[nn.Module], named: str = "") -> type[nn.Module]:
    """The one subclass for a class of module, findable by its qualified name in this module so that it pickles; `named` so."""
    if base not in _CLASSES:
        name = f"OnePass{base.__name__}"
        made = type(named or name, (mixin, base), {"__module__": __name__, "__qualname__": name})
        _CLASSES[base] = globals()[name] = made
    return _CLASSES[base]
