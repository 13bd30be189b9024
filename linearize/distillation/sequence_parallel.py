"""How rows lie over processes: each process has rows of its own, or all share each row (sequence parallel).

Where a row is shared, each process runs the model on its part of it. Only attention looks at other tokens: mixers exchange what
`sequence_mixer` says, softmax layers their keys and values. A part's loss is its sum over the mean of what all parts divide by, so
that the mean of all processes' gradients is that of whole rows, as it is where each has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from transformers import AttentionInterface, AttentionMaskInterface

from linearize.distillation.collectives import gather
from linearize.distillation.guard import drawn
from linearize.distillation.layer_losses import LayerCall
from linearize.distillation.sequence_mixer import BY_HEAD, BY_TOKEN, Part, Scatter, halves, mix, refusal, shortest
from linearize.distillation.sequence_softmax import Reach, attention, log_mass, whole_row
from linearize.errors import UnsupportedError, UsageError
from linearize.modeling.attention import IMPLEMENTATION, mask_function, scores_of
from linearize.modeling.mixer import Mixer
from linearize.modeling.modeling_linearized import attentions
from linearize.modeling.rows import segment_ids
from linearize.modeling.spec import MixerSpec
from linearize.modeling.stream import Halves, Inputs

OVER_PARTS = "linearize_parts"  # the attention function of layers that stay softmax
FLAG = "--sequence-parallel"
CHANGING = ("dynamic", "longrope")  # RoPE whose angles follow from the longest position of a call


class Alone:
    """The rows of a step that this process has to itself."""

    def cut(self, x: Tensor) -> Tensor:
        """This process's part of whole rows (B, T)."""
        return x

    def call(self, mixer: Mixer, inputs: Inputs, target: Tensor, weight: Tensor | None) -> LayerCall:
        """What losses see of a layer."""
        return LayerCall(mixer, inputs, target, weight)

    def mean(self, x: Tensor) -> Tensor:
        """Over the processes that share a row, without a gradient."""
        return x

    def apart(self, device: torch.device) -> AbstractContextManager[None]:
        """What is drawn inside is this process's own."""
        return nullcontext()


Reading = Callable[[nn.Module, Tensor], AbstractContextManager[Alone]]  # of a model and whole positions (B, T)


def alone(model: nn.Module, positions: Tensor) -> AbstractContextManager[Alone]:
    """Each process reads rows of its own."""
    return nullcontext(Alone())


@contextmanager
def sharing(group: dist.ProcessGroup, model: nn.Module, positions: Tensor) -> Iterator[Alone]:
    """All processes of `group` read the same rows: inside, `model` runs on the part of them that is this process's."""
    own = Shared(group, positions)
    with ExitStack() as stack:
        for module in attentions(model):
            stack.enter_context(_instead(module.linearize, "forward", partial(own.student, module.linearize)))
            stack.enter_context(_instead(module, "linearize_softmax", own.softmax))
        AttentionInterface.register(OVER_PARTS, own.attend)
        stack.callback(AttentionInterface.register, OVER_PARTS, _shared_no_more)  # or the registry would keep the group alive
        AttentionMaskInterface.register(OVER_PARTS, mask_function)
        for config in softmax_configs(model):
            stack.enter_context(_instead(config, "_attn_implementation_internal", OVER_PARTS))
        yield own


def _shared_no_more(*_: Any, **__: Any) -> Any:
    raise RuntimeError("rows are read in parts only inside sharing()")


@dataclass(frozen=True)
class Shared(Alone):
    """The rows of a step, whose `positions` (B, T) are whole, and which the processes of `group` share in equal parts."""

    group: dist.ProcessGroup
    positions: Tensor

    @cached_property
    def place(self) -> slice:
        """This process's tokens of each row."""
        time = self.positions.shape[1] // self.group.size()
        return slice(self.group.rank() * time, (self.group.rank() + 1) * time)

    @cached_property
    def part(self) -> Part:
        return Part(self.group, self.positions[:, self.place.start])

    @cached_property
    def reach(self) -> Reach:
        at = torch.arange(self.place.start, self.place.stop, device=self.positions.device)
        return Reach(self.place.start, at - self.cut(self.positions))

    def cut(self, x: Tensor) -> Tensor:
        return x[:, self.place]

    def call(self, mixer: Mixer, inputs: Inputs, target: Tensor, weight: Tensor | None) -> LayerCall:
        return PartCall(mixer, inputs, target, weight, rows=self)

    def mean(self, x: Tensor) -> Tensor:
        total = x.detach().to(self.positions.device, copy=True)
        dist.all_reduce(total, group=self.group)
        return (total / self.group.size()).to(x.device)

    def apart(self, device: torch.device) -> AbstractContextManager[None]:
        return drawn(device, torch.initial_seed(), self.group.rank())

    def student(self, mixer: Mixer, inputs: Inputs, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """In place of a mixer's forward; there is no state."""
        return mix(mixer, inputs, self.part), None

    def softmax(self, inputs: Inputs) -> Tensor:
        """The original attention of a converted layer (B, T, H, V)."""
        k, v = whole_row([inputs.k, inputs.v], self.group)
        return attention(inputs.q, k, v, inputs.score, self.reach)

    def attend(self, _: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, None]:
        """The attention function of layers that stay softmax."""
        k, v = whole_row([k, v], self.group)
        return attention(q, k, v, scores_of(q, kwargs), self.reach), None

    def inputs(self, mine: Inputs) -> Inputs:
        """A layer's inputs for whole rows, of which `mine` are a part; without a gradient."""
        found: dict[str, Any] = {name: getattr(mine, name) for name in (*BY_HEAD, *BY_TOKEN)}
        for name, x in found.items():
            if x is not None:
                dim = 2 if name in BY_HEAD else 1
                found[name] = torch.cat([parts[0] for parts in gather([x.detach()], self.group)], dim)
        segments = segment_ids(self.positions.shape[1], None, self.positions, self.positions.device)
        return replace(mine, **found, segments=segments)


@dataclass
class PartCall(LayerCall):
    """A layer of which this process has a part of the tokens: its losses are the part's share of whole rows'."""

    rows: Shared = field(kw_only=True)

    @cached_property
    def entered(self) -> tuple[Halves, Scatter]:
        return halves(self.mixer, self.inputs, self.rows.part)

    @cached_property
    def whole(self) -> Inputs:
        return self.rows.inputs(self.inputs)

    @property
    def first(self) -> int:
        return int(self.rows.place.start)

    @cached_property
    def log_mass(self) -> Tensor:
        (k,) = whole_row([self.inputs.k], self.rows.group)
        return log_mass(self.inputs.q, k, self.inputs.score, self.rows.reach)

    def per_row(self, x: Tensor) -> Tensor:
        return self.rows.mean(x)


def softmax_configs(model: nn.Module) -> list[Any]:
    """The configs that say which attention function the layers that stay softmax call."""
    modules = [m for m in model.modules() if hasattr(m, "config") and not hasattr(m, "linearize_attend")]
    found = {id(m.config): m.config for m in modules if hasattr(m.config, "_attn_implementation_internal")}
    return [config for config in found.values() if config._attn_implementation_internal != IMPLEMENTATION]


@contextmanager
def _instead(thing: Any, name: str, value: Any) -> Iterator[None]:
    """An object's attribute is another for a while."""
    had, before = name in vars(thing), vars(thing).get(name)
    setattr(thing, name, value)
    try:
        yield
    finally:
        if had:
            setattr(thing, name, before)
        else:
            delattr(thing, name)


def check_sharing(model: nn.Module, processes: int, lengths: Mapping[str, int]) -> None:
    """UsageError or UnsupportedError for what cannot be split: a layer, one process, `lengths` of rows by kind of stage."""
    if processes < 2:
        raise UsageError("one process has nobody to share a row with", FLAG, f"linearize distill DIR {FLAG} --num-processes 2")
    mixers: list[tuple[int, MixerSpec]] = [(module.linearize_index, module.linearize.spec) for module in attentions(model)]
    for index, spec in mixers:
        if (why := refusal(spec)) is not None:
            raise UnsupportedError(f"layer {index} cannot be split over processes: {why}", FLAG, f"leave {FLAG} out")
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, Mapping) else [kinds]:
            if kind in CHANGING:
                what = f"RoPE of type '{kind}' depends on how long a whole row is, and no process sees one"
                raise UnsupportedError(what, FLAG, f"leave {FLAG} out")
    least = max(shortest(spec) for _, spec in mixers)
    for kind, length in lengths.items():
        where, key = f"{FLAG}, stage {kind}", f"--set stages.{kind}.sequence"
        if length % processes:
            what = f"rows of {length} tokens do not split into {processes} equal parts"
            raise UsageError(what, where, f"{key}={max(length // processes, least) * processes}")
        if length // processes < least:
            what = f"parts of {length // processes} tokens are shorter than the {least} that a window reaches back"
            raise UsageError(what, where, f"{key}={least * processes} or more, or fewer processes")
