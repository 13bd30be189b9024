"""The plan: what changes in each layer and what it costs, as pure data made from a config. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from linearize import __version__
from linearize.conversion.architectures import Architecture, architecture
from linearize.conversion.selection import select_layers
from linearize.conversion.sources import Source, resolve
from linearize.methods import DEFAULT, Method, make
from linearize.modeling.spec import SCHEMA_VERSION, MixerSpec, Shape

KV_LENGTHS = (4096, 32768)
KV_DTYPE_BYTES = 2  # a softmax cache is usually kept in 16 bits; the state is counted in what it is stored in


@dataclass(frozen=True)
class Plan:
    """Method and options, the layers converted, and where the weights come from."""

    source: Source
    architecture: Architecture
    method: str
    options: Mapping[str, Any]
    start: str
    layers: tuple[int, ...]
    spec: MixerSpec
    shape: Shape

    @property
    def total(self) -> int:
        return int(self.source.config["num_hidden_layers"])

    @property
    def state_bytes(self) -> int:
        """Bytes of one sequence's state over all converted layers, activations in fp32."""
        return len(self.layers) * self.spec.state_bytes(self.shape)

    def kv_bytes(self, tokens: int, layers: int | None = None) -> int:
        """Bytes of the softmax cache of `tokens` tokens in 16 bits."""
        count = self.total if layers is None else layers
        return count * tokens * self.shape.kv_heads * (self.shape.head_dim + self.shape.value_dim) * KV_DTYPE_BYTES

    def parameters(self) -> int:
        """New parameters of one layer."""
        return count_parameters(self.spec, self.shape)

    def config_field(self) -> dict[str, Any]:
        """`config.linearize` of the checkpoint."""
        return {
            "schema": SCHEMA_VERSION,
            "version": __version__,
            "method": self.method,
            "options": dict(self.options),
            "start": self.start,
            "softmax_layers": self.total - len(self.layers),
            "layers": [
                {
                    "index": i,
                    "module": self.architecture.attention.format(i),
                    "cache": self.architecture.cache,
                    "mixer": self.spec.to_dict(),
                    "shape": asdict(self.shape),
                }
                for i in self.layers
            ],
            "source": self.source.provenance(),
            "stages": [],
        }

    def to_dict(self) -> dict[str, Any]:
        """The table, for people and machines."""
        each, added = self.spec.state_bytes(self.shape), self.parameters()
        chosen = set(self.layers)
        rows = [
            {
                "index": i,
                "module": self.architecture.attention.format(i),
                "was": "softmax",
                "becomes": self.method if i in chosen else "kept",
                "parameters": added if i in chosen else 0,
                "state_bytes": each if i in chosen else None,
            }
            for i in range(self.total)
        ]
        return {
            "source": self.source.provenance(), "method": self.method, "start": self.start, "options": dict(self.options),
            "mixer": self.spec.to_dict(), "architecture": self.architecture.model_type, "layers": rows,
            "converted": len(chosen), "kept": self.total - len(chosen), "parameters_added": added * len(chosen),
            "state_bytes": self.state_bytes,
            "kv_bytes": {str(n): self.kv_bytes(n) for n in KV_LENGTHS},
            "kv_bytes_saved": {str(n): self.kv_bytes(n, len(chosen)) - self.state_bytes for n in KV_LENGTHS},
        }  # fmt: skip


def count_parameters(spec: MixerSpec, shape: Shape) -> int:
    """Parameters that one mixer adds, from its spec alone."""
    if not spec.has_far:
        return 0
    memories, total = spec.memories(shape), 0
    if spec.feature_map == "hedgehog":
        each = shape.head_dim * (spec.feature_dim or shape.head_dim)
        total += memories * each + (0 if spec.tied_maps else shape.heads * each)
    if spec.decay in ("head", "channel"):
        outputs = memories * spec.gate_width(shape)
        total += outputs + outputs * (spec.gate_rank or shape.hidden_size) + spec.gate_rank * shape.hidden_size
    if spec.far_mass in ("head", "query"):
        total += shape.heads * (1 if spec.far_mass == "head" else shape.head_dim + 2)
    return total + spec.conv * (shape.heads + shape.kv_heads) * shape.head_dim


def plan_for(source: Source, method: Method, name: str, layers: str | None, options: Mapping[str, Any], start: str) -> Plan:
    family = architecture(source.config, source.id)
    chosen = tuple(select_layers(layers, family, source.config))
    return Plan(source, family, name, dict(options), start, chosen, method.mixer(), family.shape(source.config))


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
    made = make(method, options)
    source = resolve(model, revision, trust_remote_code)
    return plan_for(source, made, method, layers, options or {}, start)
