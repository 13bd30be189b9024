"""One token through a whole model as one compiled function, with states that stay where they are.

The function is the model's own forward on a cache whose layers write in place, exported and compiled ahead of time by
TorchInductor: no Python runs between the embedding and the logits, and what is small is fused. It depends on shapes and versions,
not on weights, which it reads where the model has them. It is kept on disk, so that only the first start of a model compiles.
"""

from __future__ import annotations

import hashlib
import os
import platform
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from linearize.errors import ResourceError, UsageError
from linearize.modeling import modeling_linearized
from linearize.modeling.memory import RecurrentLayer, State, empty_state
from linearize.modeling.native import operators, takes
from linearize.modeling.one_layer import ask_layers
from linearize.modeling.spec import MixerSpec
from linearize.progress import Progress, silent

SMALL = 16_384  # elements of a loop that is not worth a second thread
OPTIONS = {
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.enable_line_tables": False,
    "cpp.min_chunk_size": SMALL,
}
TASK = "compiling one token's step, once for this model: half a minute, or minutes without kernels"
PLAIN = ("logits_to_keep", "return_dict")  # keywords of a call that the compiled step answers as well


class InPlace(RecurrentLayer):
    """A cache layer that writes each new state into the tensors of the first one; `count`, which all layers share, it leaves."""

    in_place = True

    def __init__(self, state: State) -> None:
        super().__init__()
        self.state, self.seen, self.is_initialized = state, 1, True

    def advance(self, state: State, tokens: int, replay: Any) -> None:
        assert self.state is not None
        for name, x in state.items():
            if name != "count" and x is not self.state[name]:
                self.state[name].copy_(x)


class Step(nn.Module):
    """Logits (B, 1, vocabulary) of tokens (B, 1) after `count` (B,) others; count and states, a dict a layer, move on in place."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, count: Tensor, states: list[State]) -> Tensor:
        cache = Cache(layers=[InPlace({**state, "count": count}) for state in states])
        out = self.model(input_ids=ids, position_ids=count[:, None], past_key_values=cache, use_cache=True, return_dict=True)
        count.add_(1)
        logits: Tensor = out.logits
        return logits


def refusal(model: Any) -> str | None:
    """Why a model's step cannot be compiled, or None."""
    if model.config.linearize.get("softmax_layers"):
        return "it keeps softmax layers, whose cache grows"
    if model.device.type != "cpu":
        return f"it is on {model.device.type}, where generate() compiles by itself"
    if getattr(model, "peft_config", None):
        return "it has an adapter apart: linearize merge adds it in"
    for mixer in (attention.linearize for attention in model.linearize_swapped):
        why = waits(mixer.spec)
        if why is not None:
            return why
    return None


def waits(spec: MixerSpec) -> str | None:
    """What a step of this mixer decides only when it sees the numbers, or None."""
    if spec.block > 1:
        return "a terraced window hands its tokens on once a block"
    return f"slot_score '{spec.slot_score}' reads the memory once a window" if spec.scores_recall else None


class CompiledStep:
    """`model(ids)` for one new token of each of `batch` rows. A model's `linearize_step` is called where `takes` says so.

    It has one set of buffers. A cache whose turn comes has its state copied into them; the one before gets copies of its own.
    """

    def __init__(self, model: Any, batch: int = 1, report: Progress = silent) -> None:
        why = refusal(model)
        if why is not None:
            raise UsageError(f"this model's step cannot be compiled: {why}", "--compile", "leave --compile out")
        self.mixers = [attention.linearize for attention in model.linearize_swapped]
        with torch.no_grad():
            made = [empty_state(m.spec, m.shape, batch, model.dtype, model.device) for m in self.mixers]
        self.count: Tensor = made[0]["count"]
        self.states = [{name: x for name, x in state.items() if name != "count"} for state in made]
        self.indices = [attention.linearize_index for attention in model.linearize_swapped]
        self.batch, self.lock = batch, Lock()
        self.owner: Callable[[], Any] = _nobody  # a weak reference to the cache whose state is in the buffers, and its dicts
        self.held: list[State] = []
        self.weights = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
        self.address = _address(self.weights)
        path = folder() / f"{_key(model, self.weights, batch)}.pt2"
        if not path.exists():
            self._compile(model, path, report)
        self.run = _opened(path, self.weights)

    def takes(
        self, model: Any, ids: Tensor | None, mask: Tensor | None, positions: Tensor | None, cache: Any, options: Mapping[str, Any]
    ) -> bool:
        """Whether a call is one plain step of this model on a cache that is not recording, and wants no gradients."""
        if ids is None or ids.shape != (self.batch, 1) or cache is None or torch.is_grad_enabled() or model.training:
            return False
        if any(x is not None and x is not False and name not in PLAIN for name, x in options.items()):
            return False
        inside = zip(model.linearize_swapped, self.mixers, strict=True)
        if any(attention.linearize is not mixer or mixer.ablate is not None for attention, mixer in inside):
            return False
        layers = [cache.layers[i] for i in self.indices]
        if any(layer.state is None or layer.recording for layer in layers) or _address(self.weights) != self.address:
            return False
        count = layers[0].state["count"]
        told = count == (layers[0].seen if positions is None else positions.expand(self.batch, 1)[:, 0])
        return len(count) == self.batch and bool(told.all()) and (mask is None or bool(mask[:, -1].all()))

    def __call__(self, ids: Tensor, cache: Any) -> CausalLMOutputWithPast:
        layers = [cache.layers[i] for i in self.indices]
        with self.lock:
            self._adopt(cache, layers)
            logits = self.run(ids.contiguous(), self.count, self.states)  # a compiled function takes strides as they were
        for layer in layers:
            layer.seen += 1
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def release(self, cache: Any) -> None:
        """Give a cache its state in tensors of its own, before something else reads it."""
        with self.lock:
            if cache is not None and self.owner() is cache:
                self._evict()

    def _adopt(self, cache: Any, layers: list[Any]) -> None:
        """Make the buffers this cache's state, if they are not."""
        if self.owner() is cache and all(layer.state is held for layer, held in zip(layers, self.held, strict=True)):
            return
        given = [{name: x.clone() for name, x in layer.state.items()} for layer in layers]
        self._evict()
        self.held, self.owner = [{**state, "count": self.count} for state in self.states], weakref.ref(cache)
        for layer, held, values in zip(layers, self.held, given, strict=True):
            for name, x in held.items():
                x.copy_(values[name])
            layer.state, layer.replay, layer.replayable = held, None, 0

    def _evict(self) -> None:
        cache, self.owner = self.owner(), _nobody
        for i, held in zip(self.indices, self.held, strict=True) if cache is not None else ():
            if cache.layers[i].state is held:
                cache.layers[i].state = {name: x.clone() for name, x in held.items()}

    def _compile(self, model: Any, path: Path, report: Progress) -> None:
        report(TASK, 0, 1)
        ask_layers(model)
        began = time.monotonic()
        with torch.no_grad(), warnings.catch_warnings(), _alone(model):
            warnings.simplefilter("ignore")
            ids = torch.zeros(self.batch, 1, dtype=torch.long, device=model.device)
            program = torch.export.export(Step(model), (ids, self.count, self.states), strict=False)
            path.parent.mkdir(parents=True, exist_ok=True)
            staged = path.with_name(f"{path.stem}.tmp-{os.getpid()}.pt2")
            try:
                torch._inductor.aoti_compile_and_package(program, package_path=str(staged), inductor_configs=dict(OPTIONS))
                os.replace(staged, path)
            except RuntimeError as error:
                what = str(error).strip().splitlines()[0]
                raise ResourceError(f"the compiler failed ({what})", "--compile", "install g++, or leave --compile out") from error
            finally:
                staged.unlink(missing_ok=True)
        report(TASK, 1, 1, seconds=time.monotonic() - began)

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of the model has no compiled step: this one reads the weights of its own."""


def compile_step(model: Any, batch: int = 1, report: Progress = silent) -> None:
    """Let `model` take its one-token steps of `batch` rows by a compiled function. UsageError where that cannot be."""
    model.linearize_step = CompiledStep(model, batch, report)


def folder() -> Path:
    """Where compiled steps are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "linearize" / "steps"


def _nobody() -> Any:
    return None


@contextmanager
def _alone(model: Any) -> Iterator[None]:
    """The model's plain forward, and nothing that was traced left in it."""
    step, model.linearize_step = model.linearize_step, None
    try:
        yield
    finally:
        model.linearize_step = step
        for attention in model.linearize_swapped:
            attention.linearize_call = None


def _address(weights: Mapping[str, Tensor]) -> tuple[int, int]:
    """Changes when a model is moved, cast or grown."""
    return next(iter(weights.values())).data_ptr(), len(weights)


def _key(model: Any, weights: Mapping[str, Tensor], batch: int) -> str:
    """What the compiled function depends on, as a file's name."""
    sources = [Path(__file__), *sorted(Path(modeling_linearized.__file__).parent.glob("*.py"))]
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_")}
    laid = sorted((name, str(x.dtype), tuple(x.shape), x.stride()) for name, x in weights.items())
    kernels = takes(torch.ones(1))  # what is traced with them needs them
    where = (torch.__version__, transformers.__version__, platform.machine(), torch.backends.cpu.get_cpu_capability(), kernels)
    facts = (config, laid, batch, type(model).__name__, where, torch.get_num_threads(), OPTIONS)
    found = hashlib.sha256(repr(facts).encode())
    for source in sources:
        found.update(source.read_bytes())
    return found.hexdigest()[:32]


def _opened(path: Path, weights: Mapping[str, Tensor]) -> Any:
    """The compiled function, reading its constants where the model has them."""
    operators()
    run: Any = torch._inductor.aoti_load_package(str(path))
    constants = {name: weights[name.removeprefix("model.")].detach() for name in run.get_constant_fqns()}
    run.load_constants(constants, check_full_update=True, user_managed=True)
    return run
