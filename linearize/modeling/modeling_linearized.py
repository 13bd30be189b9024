"""Linearized<Class> for a transformers config or model class: any decoder or encoder with its attention swapped by a plan.

The classes are made on first use, by name, from the architecture's own; `config.linearize` is the plan that says which
modules became which mixers. This file is the entry of a checkpoint's `auto_map`, and every file beside it is reachable
from here.
"""

from __future__ import annotations

import functools
import inspect
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import torch
    import transformers
    from torch import Tensor, nn
    from transformers import AutoConfig, DynamicCache, GenerationMixin, PreTrainedConfig
    from transformers.models.auto import configuration_auto, modeling_auto
except ImportError as error:
    raise ImportError("linearize models need torch and transformers") from error

from .attention import IMPLEMENTATION, Call, LinearizedAttention, Observer, set_mode, swap, upgrade_cache
from .matvec import products
from .memory import share_counts
from .mixer import Mixer
from .one_layer import layers_in_one_pass
from .one_pass import in_one_pass
from .places import Places
from .plans import is_causal, plan_layers, plan_spec
from .rows import segment_ids
from .spec import MixerSpec

PREFIX = "linearized_"
DECODER_HEADS = {"AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"}
ENCODER_HEADS = {
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
}
RUNTIME = Path(__file__).resolve().parent


class LinearizedConfigMixin:
    """A base architecture's flat config with the plan in `linearize`."""

    linearize: dict[str, Any]

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        if not hasattr(self, "linearize"):
            self.linearize = {}
        # the model classes are made only once a config of theirs has a plan: importing every architecture would take seconds
        for auto, made in head_classes(type(self).model_type, self.linearize).items():  # type: ignore[attr-defined]
            getattr(transformers, auto).register(type(self), linearized_class(made), exist_ok=True)


def head_classes(model_type: str, plan: Mapping[str, Any]) -> dict[str, str]:
    """Which Auto classes load a checkpoint of this plan, and the base's class that each of them makes; none without a plan."""
    if not plan.get("layers"):
        return {}
    tables = DECODER_HEADS if is_causal(plan) else ENCODER_HEADS
    return {auto: getattr(modeling_auto, table)[model_type.removeprefix(PREFIX)] for auto, table in tables.items()}


class LinearizedModelMixin:
    """What every converted model does otherwise than its base class."""

    linearize_mode = "student"
    linearize_step: Any = None  # serving may answer calls of one token otherwise
    linearize_swapped: list[LinearizedAttention]
    is_linearized_model = True
    _is_stateful = False
    _supports_attention_backend = False
    _keep_in_fp32_modules_strict = {"linearize"}  # noqa: RUF012

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        install(self)

    def _check_length(self, time: int, cache: Any = None) -> None:
        """ValueError for a text longer than the positions that the model learned."""
        limit = self.config.linearize.get("max_positions")  # type: ignore[attr-defined]
        total = time + (0 if cache is None else cache.get_seq_length())
        if limit and total > limit:
            raise ValueError(f"this model has learned positions for {limit} tokens, and the text has {total}")

    def _told(self, call: Call) -> Call:
        """The call, which every layer is told of: some families do not hand every keyword on to them."""
        for attention in self.linearize_swapped:
            vars(attention)["linearize_call"] = call  # a module's own way of setting takes five times as long
        return call

    def register_for_auto_class(self, *_: Any, **__: Any) -> None:
        """Nothing: `save_pretrained` writes auto_map itself, with names that no wrapper class can change."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", True):
            copy_runtime(Path(save_directory))
        return result


class LinearizedEncoderMixin(LinearizedModelMixin):
    """What a converted encoder does otherwise than its base class: no cache, and padding and packing by rows."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if self.linearize_mode != "teacher":
            tokens = given(input_ids, inputs_embeds)
            self._check_length(tokens.shape[1])
            if attention_mask is not None and attention_mask.dim() != 2:
                raise ValueError("a linearized encoder takes an attention_mask (batch, tokens), 1 for real tokens")
            segments = None
            if attention_mask is None:
                segments = segment_ids(tokens.shape[1], kwargs.get("cu_seq_lens_q"), position_ids, tokens.device)
            kwargs["linearize_call"] = self._told(Call(attention_mask, segments))
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
        )


class LinearizedDecoderMixin(LinearizedModelMixin):
    """What a converted CausalLM does otherwise than its base class."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        tokens = given(input_ids, inputs_embeds)
        call = {
            "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
            "past_key_values": past_key_values, "inputs_embeds": inputs_embeds, "use_cache": use_cache,
        }  # fmt: skip
        if self.linearize_mode != "teacher":
            call |= self._own(tokens, attention_mask, position_ids, past_key_values, use_cache, kwargs.get("cu_seq_lens_q"))
        with products(self.get_input_embeddings().weight, tokens):  # type: ignore[attr-defined]
            step = self.linearize_step if self.linearize_mode == "student" else None
            if step is not None:
                cache = call["past_key_values"]
                if step.takes(self, input_ids, attention_mask, call["position_ids"], cache, kwargs):
                    return step(input_ids, cache)
                step.release(cache)
            return super().forward(**call, **kwargs)  # type: ignore[misc]

    def _own(
        self, tokens: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Any, use_cache: bool | None,
        cu_seq_lens: Tensor | None,
    ) -> dict[str, Any]:  # fmt: skip
        """What a student's call is given otherwise than the original's: a cache of constant size, positions of real tokens."""
        time, segments, mask = tokens.shape[1], None, None
        self._check_length(time, cache)
        if attention_mask is None and (cache is None or cache.get_seq_length() == 0):
            segments = segment_ids(time, cu_seq_lens, position_ids, tokens.device)
        if segments is not None or self.linearize_mode == "observe" or (use_cache is None and self.training):  # type: ignore[attr-defined]
            use_cache, cache = False, None
        elif cache is None and (self.config.use_cache if use_cache is None else use_cache):  # type: ignore[attr-defined]
            cache = DynamicCache(config=self.config)  # type: ignore[attr-defined]
        if attention_mask is not None and attention_mask.dim() == 2:
            mask = attention_mask[:, -time:]
            if position_ids is None:
                position_ids = positions(attention_mask, time, cache)
        if cache is not None:
            layers = upgrade_cache(cache, converted(self))
            share_counts(layers)
        call = self._told(Call(mask, segments, Places()))
        return {"position_ids": position_ids, "past_key_values": cache, "use_cache": use_cache, "linearize_call": call}

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Without what a family adds: phi3 drops its cache where its RoPE switches tables, and a state cannot be made again."""
        plain: Any = GenerationMixin.prepare_inputs_for_generation
        return plain(self, *args, **kwargs)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            upgrade_cache(cache, converted(self))
        return result

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        return attention_mask

    def generate_batch(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("continuous batching pages keys and values; a linearized model has none: use generate()")

    init_continuous_batching = generate_batch


def given(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """The tokens of a call, whichever way they come; ValueError if they do not."""
    tokens = input_ids if input_ids is not None else inputs_embeds
    if tokens is None:
        raise ValueError("pass input_ids or inputs_embeds")
    return tokens


def positions(attention_mask: Tensor, time: int, cache: Any) -> Tensor:
    """Position of each new token: how many real tokens of its row came before (0 at pads)."""
    seen = 0 if cache is None else cache.get_seq_length()
    past: Tensor | int = 0
    if seen and attention_mask.shape[1] == time:  # the mask tells of the new tokens only
        counted = [layer.state["count"] for layer in cache.layers if getattr(layer, "is_linearize_layer", False)]
        past = counted[0][:, None]
    return (attention_mask.long().cumsum(-1)[:, -time:] - 1 + past).clamp(min=0)


def install(model: Any, device: torch.device | None = None) -> None:
    """Swap the attention modules that the model's plan names, with mixers on `device` (default: where each attention is).

    ValueError on a plan of another schema.
    """
    plan = model.config.linearize
    layers = plan_layers(plan)
    model.linearize_swapped = []
    all_converted = bool(layers) and plan.get("softmax_layers", 0) == 0
    # before the mixers come, and norms that are recorded; layers that stay as they are stay so to the bit
    for name in [""] if all_converted else [layer["module"].rpartition(".")[0] for layer in layers]:
        in_one_pass(model.get_submodule(name))
    for layer in layers:
        spec, shape = plan_spec(plan, layer)
        attention = model.get_submodule(layer["module"])
        with torch.device(device or next(attention.parameters()).device):
            mixer = Mixer(spec, shape)
        swap(attention, mixer, layer["cache"], layer["index"], layer.get("rope", "half"), model._supports_sdpa)
        model.linearize_swapped.append(attention)
    layers_in_one_pass(model)
    if all_converted:
        model.config._attn_implementation_internal = IMPLEMENTATION


def attentions(model: Any) -> list[LinearizedAttention]:
    """The swapped attention modules in order of layer."""
    found = [m for m in model.modules() if hasattr(m, "linearize_attend")]
    return sorted(found, key=lambda m: m.linearize_index)


def converted(model: Any) -> list[int]:
    return [layer["index"] for layer in model.config.linearize["layers"]]


@contextmanager
def mode(model: nn.Module, name: str) -> Iterator[None]:
    """Run the model as its teacher ('teacher': mixers off) or as the teacher under observation ('observe')."""
    modules = attentions(model)
    if not modules:  # a stock model is its own teacher
        yield
        return
    wholes = [m for m in model.modules() if hasattr(m, "is_linearized_model")]
    passes: list[Any] = [m for m in model.modules() if hasattr(m, "linearize_plain")]
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config") and not hasattr(m, "linearize_attend")}
    before = [(c, c._attn_implementation_internal) for c in configs.values() if hasattr(c, "_attn_implementation_internal")]
    implementation = IMPLEMENTATION if name != "teacher" else modules[0].linearize_configs["teacher"]._attn_implementation_internal
    try:
        for config, current in before:
            if current == IMPLEMENTATION:
                config._attn_implementation_internal = implementation
        for module in modules:
            set_mode(module, name)
        for whole in wholes:
            whole.linearize_mode = name  # type: ignore[assignment]
        for one in passes:
            one.linearize_plain = name == "teacher"
        yield
    finally:
        for config, current in before:
            config._attn_implementation_internal = current
        for module in modules:
            set_mode(module, "student")
        for whole in wholes:
            whole.linearize_mode = "student"  # type: ignore[assignment]
        for one in passes:
            one.linearize_plain = False


@contextmanager
def observed(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Let `observer(attention, inputs, target)` see every layer of the calls made in mode 'observe'."""
    modules = attentions(model)
    try:
        for module in modules:
            module.linearize_observer = observer
        yield
    finally:
        for module in modules:
            module.linearize_observer = None


@contextmanager
def ablated(model: nn.Module, half: str | None) -> Iterator[None]:
    """Run the model with the 'far' or the 'near' half of every mixer left out."""
    inner = [module for attention in attentions(model) for module in attention.linearize.modules()]
    mixers: list[Any] = [module for module in inner if "ablate" in vars(module)]  # peft may have wrapped them
    try:
        for mixer in mixers:
            mixer.ablate = half
        yield
    finally:
        for mixer in mixers:
            mixer.ablate = None


@contextmanager
def replaced(model: nn.Module, spec: MixerSpec) -> Iterator[None]:
    """Run the model with parameter-free mixers of `spec` (a window alone, say) in place of its own."""
    modules = attentions(model)
    own = [module.linearize for module in modules]
    try:
        for module, mixer in zip(modules, own, strict=True):
            module.linearize = Mixer(spec, mixer.shape)
        yield
    finally:
        for module, mixer in zip(modules, own, strict=True):
            module.linearize = mixer


def copy_runtime(directory: Path) -> None:
    """Write this folder's files and the config's auto_map into a checkpoint, so that it loads where linearize is not installed."""
    for source in sorted(RUNTIME.glob("*.py")):
        if source.name != "__init__.py" and directory.resolve() != RUNTIME:
            shutil.copyfile(source, directory / source.name)
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    name = config["architectures"][0].removeprefix("FSDP")
    base, stem = config_name(config["model_type"].removeprefix(PREFIX)), Path(__file__).stem
    config["architectures"] = [name]
    heads = head_classes(config["model_type"], config["linearize"])
    config["auto_map"] = {auto: f"{stem}.Linearized{made}" for auto, made in {"AutoConfig": base, **heads}.items()}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def linearized_class(base_name: str) -> Any:
    """The class Linearized<base_name> of a transformers config or model class; made once and kept in this module."""
    name = f"Linearized{base_name}"
    if name in globals():
        return globals()[name]
    base = getattr(transformers, base_name, None)
    if base is None:
        raise AttributeError(f"transformers has no {base_name}")
    if issubclass(base, PreTrainedConfig):
        made = type(name, (LinearizedConfigMixin, base), {"__module__": __name__, "model_type": PREFIX + base.model_type})
    else:
        config = linearized_class(base.config_class.__name__)
        cached = "past_key_values" in inspect.signature(base.forward).parameters
        mixin = LinearizedDecoderMixin if cached else LinearizedEncoderMixin
        forward = _forward_like(base.forward, mixin.forward)
        made = type(name, (mixin, base), {"__module__": __name__, "config_class": config, "forward": forward})
    globals()[name] = made
    return made


def config_name(model_type: str) -> str:
    """The name of a family's config class in transformers."""
    return str(configuration_auto.CONFIG_MAPPING_NAMES[model_type])  # type: ignore[attr-defined]


def _forward_like(original: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    """The mixin's `own` forward with the signature of the base's: Trainer looks there for labels, generate() for logits_to_keep."""
    names = list(inspect.signature(original).parameters)[1:]

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, **dict(zip(names, args, strict=False)), **kwargs)

    return forward


def register(model_types: Iterable[str]) -> None:
    """Make AutoConfig (and through it the Auto classes of models) know the linearized form of these families."""
    for model_type in model_types:
        config = linearized_class(config_name(model_type))
        AutoConfig.register(config.model_type, config, exist_ok=True)


def __getattr__(name: str) -> Any:
    if name.startswith("Linearized"):
        return linearized_class(name.removeprefix("Linearized"))
    raise AttributeError(name)
