"""What a stage does with rows: attention transfer layer by layer, or the whole student against its teacher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from math import ceil
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from linearize.conversion.calibration import few_logits
from linearize.distillation.guard import drawn
from linearize.distillation.layer_losses import LAYER_LOSSES
from linearize.distillation.logit_losses import LOGIT_LOSSES, NEEDS_TEACHER, LogitCall
from linearize.distillation.losses import terms
from linearize.distillation.sequence_parallel import Alone, Reading, alone
from linearize.methods.base import Stage
from linearize.modeling.attention import LinearizedAttention
from linearize.modeling.mixer import Mixer
from linearize.modeling.modeling_linearized import attentions, mode, observed
from linearize.modeling.spec import MixerSpec
from linearize.modeling.stream import Inputs

if TYPE_CHECKING:
    from accelerate import Accelerator

HIDDEN_SHARE = 0.15  # of the tokens, as in BERT (Devlin et al. 2019)


def mixer_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The new parameters, by name."""
    return {name: p for name, p in model.named_parameters() if ".linearize." in name}


def learnt_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those of the new parameters that have a gradient: a choice of tokens has none."""
    return {name: p for name, p in mixer_parameters(model).items() if not name.split(".linearize.")[1].startswith("slot_score.")}


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def first_position(model: Any) -> int:
    """The learned position of a text's first token."""
    return int(model.config.linearize.get("first_position") or 0)


def drawn_window(stage: Stage, window: int) -> int:
    """A window for one step: now and then a single token, else one between the stage's smallest and the mixer's own."""
    if not window or not (stage.window_min or stage.window_dropout):
        return window
    if float(torch.rand(())) < stage.window_dropout:
        return 1
    low = min(stage.window_min or window, window)
    return int(torch.randint(low, window + 1, ()))


@contextmanager
def narrowed(mixers: list[Mixer], stage: Stage) -> Iterator[None]:
    """Mixers with a drawn window, the same for all of one size, and a share of their slots, so that the memory behind is used.

    With a share s of the slots, and scores that fade 1 / s times as fast, a row of T tokens loses what one of T / s would.
    """
    kept, share = [mixer.spec for mixer in mixers], stage.slot_share
    drawn = {window: drawn_window(stage, window) for window in sorted({spec.window for spec in kept})}
    rates = [mixer.slot_score.rate for mixer in mixers if mixer.slot_score is not None and share < 1]
    before = [rate.detach().clone() for rate in rates]
    try:
        for mixer, spec in zip(mixers, kept, strict=True):
            slots, more = ceil(share * spec.slots), ceil(share * spec.more_slots)
            mixer.spec = replace(spec, window=drawn[spec.window], slots=slots, more_slots=more)
        for rate in rates:  # in place: where parameters are sharded, others hold their storage
            rate.detach().div_(share)
        yield
    finally:
        for mixer, spec in zip(mixers, kept, strict=True):
            mixer.spec = spec
        for rate, old in zip(rates, before, strict=True):
            rate.detach().copy_(old)


def token_weight(stage: Stage, specs: Iterable[MixerSpec], positions: Tensor) -> Tensor | None:
    """far_weight for tokens that have others beyond some mixer's sinks and window, 1 for the rest (B, T); None: all are alike."""
    if stage.far_weight == 1:
        return None
    reach = min(spec.sinks + spec.window for spec in specs)
    return torch.where(positions >= reach, stage.far_weight, 1.0)


class AttentionTransfer:
    """Each mixer learns its layer's attention on the teacher's own inputs: one backward pass a layer, freed at once."""

    def __init__(self, model: nn.Module, stage: Stage, reading: Reading = alone) -> None:
        self.model, self.stage, self.terms, self.reading = model, stage, terms(stage), reading
        self.by_layer: dict[int, float] = {}
        self.positions: Tensor
        self.rows: Alone

    def backward(self, ids: Tensor, positions: Tensor) -> float:
        """Adds the gradients of every mixer; returns the mean loss over layers."""
        with self.reading(self.model, positions) as self.rows:
            self.by_layer, self.positions = {}, self.rows.cut(positions)
            with torch.no_grad(), observed(self.model, self._observe), mode(self.model, "observe"):
                self.read(self.rows.cut(ids), self.positions)
            losses: list[float] = self.rows.mean(torch.tensor(list(self.by_layer.values()), dtype=torch.float64)).tolist()
        self.by_layer = dict(zip(self.by_layer, losses, strict=True))
        return sum(losses) / len(losses)

    def read(self, ids: Tensor, positions: Tensor) -> None:
        """Run the teacher, under observation, over rows (B, T)."""
        self.model(input_ids=ids, position_ids=positions + first_position(self.model), **few_logits(self.model))

    def _observe(self, attention: LinearizedAttention, inputs: Inputs, target: Tensor) -> None:
        mixer: Mixer = attention.linearize
        if not any(p.requires_grad for p in mixer.parameters()):
            return
        weight = token_weight(self.stage, [mixer.spec], self.positions)
        # what a layer draws does not depend on which layers run before it
        own = drawn(inputs.q.device, torch.initial_seed(), attention.linearize_index)
        with torch.enable_grad(), own, narrowed([mixer], self.stage):
            call = self.rows.call(mixer, inputs, target, weight)
            loss = torch.stack([factor * LAYER_LOSSES[name](call) for name, factor in self.terms.items()]).sum()
            if loss.requires_grad:
                loss.backward()
        self.by_layer[attention.linearize_index] = float(loss.detach())


class LogitDistillation:
    """The whole student against its teacher: the same network with mixers and adapters switched off.

    A decoder predicts the next token; an encoder, for which `mask_token` is given, the tokens that it hides.
    """

    by_layer: Mapping[int, float] = MappingProxyType({})

    def __init__(
        self,
        accelerator: Accelerator,
        wrapped: nn.Module,
        model: Any,
        stage: Stage,
        mask_token: int | None,
        reading: Reading = alone,
    ) -> None:
        self.accelerator, self.wrapped, self.model, self.stage = accelerator, wrapped, model, stage
        self.terms, self.mask_token, self.reading = terms(stage), mask_token, reading
        self.mixers = [attention.linearize for attention in attentions(model)]
        self.options = {"use_cache": False} if mask_token is None else {}
        if "hidden" in self.terms:
            self.options["output_hidden_states"] = True

    def backward(self, ids: Tensor, positions: Tensor) -> float:
        """Loss by the global weight of target tokens; adds the gradients; returns this process's share of the loss."""
        with self.reading(self.model, positions) as rows:
            weight = token_weight(self.stage, [mixer.spec for mixer in self.mixers], positions)
            inputs, targets, counted = (rows.cut(x) for x in self.task(ids, positions))
            given = {"input_ids": inputs, "position_ids": rows.cut(positions) + first_position(self.model), **self.options}
            weight = counted[counted].float() if weight is None else rows.cut(weight)[counted]
            share = self.accelerator.reduce(weight.sum(), "mean").clamp(min=1e-12)
            teacher = self._taught(given)
            with narrowed(self.mixers, self.stage), rows.apart(ids.device):
                student = self.wrapped(**given)
                call = LogitCall(
                    student.logits[counted], targets[counted], weight, None if teacher is None else teacher.logits[counted],
                    self.stage.temperature, self._hidden(student, teacher, counted),
                )  # fmt: skip
                loss = torch.stack([factor * LOGIT_LOSSES[name](call) for name, factor in self.terms.items()]).sum() / share
                self.accelerator.backward(loss)
        return float(loss.detach())

    def _taught(self, given: Mapping[str, Any]) -> Any:
        """What the teacher says, where the loss looks at it."""
        if not NEEDS_TEACHER & self.terms.keys():
            return None
        # not in mode 'teacher': transformers' own encoders, OPT and gpt-oss do not tell packed documents apart
        with torch.no_grad(), self._without_adapters(), mode(self.model, "observe"):
            return self.model(**given)

    def _hidden(self, student: Any, teacher: Any, counted: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Hidden states after each layer (N, hidden), student's and teacher's, where the loss looks at them."""
        if "hidden" not in self.terms:
            return []
        pairs = zip(student.hidden_states[1:], teacher.hidden_states[1:], strict=True)
        return [(own[counted], other[counted]) for own, other in pairs]

    def task(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the model reads, what it is to say at each token, and which tokens count, each (B, T)."""
        if self.mask_token is None:
            return ids, ids.roll(-1, 1), torch.nn.functional.pad(positions[:, 1:] > 0, (0, 1))
        draw = torch.Generator().manual_seed(int(ids.sum()))  # a row hides the same tokens each time, on any device
        hidden = (torch.rand(ids.shape, generator=draw).to(ids.device) < HIDDEN_SHARE) & (positions > 0)
        return ids.masked_fill(hidden, self.mask_token), ids, hidden

    def _without_adapters(self) -> AbstractContextManager[Any]:
        return self.model.disable_adapter() if hasattr(self.model, "disable_adapter") else nullcontext()
