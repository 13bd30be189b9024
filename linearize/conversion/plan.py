"""The plan: what changes in each layer and what it costs, as pure data made from a config. Only counting parameters needs torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from linearize import __version__
from linearize.conversion.architectures import Architecture
from linearize.conversion.detection import architecture, recognised
from linearize.conversion.selection import kept_count, select_layers
from linearize.conversion.sources import Source, resolve
from linearize.conversion.streaming import Route, route, tokens_at_once
from linearize.errors import InputError, UnsupportedError
from linearize.methods import DEFAULT, get, single_names
from linearize.methods.layout import Place, check_mentioned, check_options, layout
from linearize.modeling.plans import SCHEMA_VERSION, shared
from linearize.modeling.spec import MixerSpec, Shape

KV_LENGTHS = (4096, 32768)
KV_DTYPE_BYTES = 2  # a softmax cache is usually kept in 16 bits; the state is counted in what it is stored in


@dataclass(frozen=True)
class Plan:
    """Method and options, what each converted layer becomes, and where the weights come from."""

    source: Source
    architecture: Architecture
    method: str
    options: Mapping[str, Any]
    start: str
    parts: Mapping[int, Place]
    shape: Shape
    keeps: int = 0  # how many of the parts stay softmax once the cost of each layer's swap is measured

    @property
    def total(self) -> int:
        return self.architecture.layers(self.source.config)

    @property
    def route(self) -> Route:
        """How the weights get to the checkpoint, and what memory that takes."""
        if self.keeps:
            return Route(False, "keep:auto measures the whole model", None)
        return route(self.source, self.architecture, tokens_at_once(self.mixers))

    @property
    def parameters_added(self) -> int:
        """Parameters of all mixers."""
        return self._of_all({mixer: count_parameters(mixer, self.shape) for mixer in self.mixers})

    def without(self, layers: Collection[int]) -> Plan:
        """The plan once it is known which layers stay."""
        return replace(self, parts={i: place for i, place in self.parts.items() if i not in layers}, keeps=0)

    @property
    def max_positions(self) -> int | None:
        """The most tokens that a text may have."""
        return self.architecture.max_positions(self.source.config)

    @property
    def state_bytes(self) -> int:
        """Bytes of one sequence's state over all converted layers, activations in fp32."""
        return self._of_all({mixer: mixer.state_bytes(self.shape) for mixer in self.mixers})

    @property
    def mixers(self) -> set[MixerSpec]:
        return {part.mixer for part in self.parts.values()}

    def _of_all(self, each: Mapping[MixerSpec, int]) -> int:
        """The sum over converted layers; their mean for those of which it is not known yet whether they stay."""
        count = len(self.parts)
        return sum(each[part.mixer] for part in self.parts.values()) * (count - self.keeps) // count

    def kv_bytes(self, tokens: int, layers: Iterable[int] | None = None) -> int:
        """Bytes of the softmax cache of `tokens` tokens in 16 bits, of all layers or these; one that slides keeps its window."""
        sliding = self.architecture.sliding(self.source.config)
        kept = (min(tokens, sliding[i] or tokens) for i in (range(self.total) if layers is None else layers))
        return sum(kept) * self.shape.kv_heads * (self.shape.head_dim + self.shape.value_dim) * KV_DTYPE_BYTES

    def kv_bytes_saved(self, tokens: int) -> int:
        """How many of these bytes the conversion does without; where it is not known which layers stay, by the mean of them."""
        count = len(self.parts)
        return self.kv_bytes(tokens, self.parts) * (count - self.keeps) // count - self.state_bytes

    def config_field(self) -> dict[str, Any]:
        """`config.linearize` of the checkpoint."""
        return {
            "schema": SCHEMA_VERSION,
            "version": __version__,
            "method": self.method,
            "options": dict(self.options),
            "start": self.start,
            "softmax_layers": self.total - len(self.parts),
            "max_positions": self.max_positions,
            "first_position": self.architecture.first_position(self.source.config),
            **shared(
                [
                    {
                        "index": i,
                        "module": self.architecture.attention.format(i),
                        "cache": self.architecture.cache,
                        "rope": self.architecture.rope_of(self.source.config, i),
                        "method": part.name,
                        "mixer": part.mixer.stored(),
                        "shape": asdict(self.shape),
                    }
                    for i, part in sorted(self.parts.items())
                ]
            ),
            "source": self.source.provenance(),
            "stages": [],
        }

    def to_dict(self) -> dict[str, Any]:
        """The table, for people and machines."""
        added = {mixer: count_parameters(mixer, self.shape) for mixer in self.mixers}
        rows = [self._row(i, self.parts.get(i), added) for i in range(self.total)]
        chosen = len(self.parts) - self.keeps
        lengths = KV_LENGTHS if self.architecture.causal else ()  # an encoder caches nothing
        return {
            "source": self.source.provenance(), "method": self.method, "start": self.start, "options": dict(self.options),
            "mixers": {part.name: part.mixer.to_dict() for part in self.parts.values()},
            "architecture": self.architecture.model_type, "limits": self.architecture.limits, "layers": rows,
            "converted": chosen, "kept": self.total - chosen, "kept_by_cost": self.keeps,
            "conversion": self.route.to_dict(),
            "parameters_added": self._of_all(added),
            "state_bytes": self.state_bytes,
            "kv_bytes": {str(n): self.kv_bytes(n) for n in lengths},
            "kv_bytes_saved": {str(n): self.kv_bytes_saved(n) for n in lengths},
        }  # fmt: skip

    def _row(self, index: int, part: Place | None, added: Mapping[MixerSpec, int]) -> dict[str, Any]:
        window = self.architecture.sliding(self.source.config)[index] if self.architecture.causal else None
        slides = self.kv_bytes(window, (index,)) if window else None  # a kept layer's cache that does not grow
        return {
            "index": index,
            "module": self.architecture.attention.format(index),
            "was": "softmax",
            "becomes": part.name if part else "kept",
            "parameters": added[part.mixer] if part else 0,
            "state_bytes": part.mixer.state_bytes(self.shape) if part else slides,
        }


def count_parameters(spec: MixerSpec, shape: Shape) -> int:
    """Parameters that one mixer adds, counted on a mixer that holds no memory."""
    import torch

    from linearize.modeling.mixer import Mixer

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Mixer(spec, shape).parameters())


def family_of(source: Source) -> Architecture:
    """The registered family of a source, or one that passes a self-check on random weights; UnsupportedError with the reason."""
    if recognised(source.config) or source.format == "gguf":
        return architecture(source.config, source.id)
    from linearize.conversion.discovery import discover

    return discover(source.config, source.id)


def reaching(place: Place, sliding: int | None) -> Place:
    """The place with a window no longer than the reach of the layer's own attention."""
    if sliding is None or place.mixer.window <= sliding:
        return place
    return replace(place, mixer=replace(place.mixer, window=sliding))


def bidirectional(place: Place, where: str) -> Place:
    """The place in an encoder. UnsupportedError with the reason if its method supposes that tokens come one after another."""
    mixer = replace(place.mixer, causal=False)
    if problems := mixer.problems():
        serve = [name for name in single_names() if not replace(get(name)().point(), causal=False).problems()]
        what = f"method {place.name} cannot convert an encoder ({problems[0]})"
        raise UnsupportedError(what, where, f"--method {' | '.join(serve)}")
    return replace(place, mixer=mixer)


def plan_for(source: Source, method: str, layers: str | None, options: Mapping[str, Any], start: str) -> Plan:
    """The plan for a known source; an error says which layer, option or method is wrong."""
    family = family_of(source)
    chosen = select_layers(layers, family, source.config)
    shape, sliding = family.shape(source.config), family.sliding(source.config)
    norm_eps = float(source.config.get("rms_norm_eps", 1e-6))
    check_mentioned(options, len(sliding))
    parts = {}
    for i, layer in enumerate(chosen):
        places = layout(method, options, start, layer)
        place = places[i % len(places)]
        if place is not None:
            place = place if family.causal else bidirectional(place, source.id)
            parts[layer] = reaching(place.within(shape, norm_eps), sliding[layer])
    if not parts:
        raise InputError(f"'{method}' converts none of the layers", "--method", "a pattern must reach a method within the layers")
    return Plan(source, family, method, dict(options), start, parts, shape, kept_count(layers, len(parts)))


def make_plan(
    model: str,
    *,
    method: str = DEFAULT,
    options: Mapping[str, Any] | None = None,
    layers: str | None = None,
    start: str = "calibrated",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Plan a conversion from MODEL's config alone: nothing is loaded, at most config.json is fetched."""
    check_options(method, options, start)  # a wrong method or option is said before anything is looked for
    return plan_for(resolve(model, revision, trust_remote_code), method, layers, options or {}, start)
