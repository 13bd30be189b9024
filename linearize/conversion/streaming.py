"""Which sources are converted without ever being whole in memory, and what that takes. Torch-free: the plan says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from linearize.conversion.preflight import safetensors_header, weight_files
from linearize.conversion.sources import Source

CALIBRATION_ROWS, CALIBRATION_LENGTH = 2, 1024
SHARD_BYTES = 1_000_000_000  # a checkpoint is written in files of at most this size
WIDEST = 4  # bytes: nothing is held in more than fp32
ROW_BLOCK = 256  # queries whose scores a start looks at in one go
SCORE_BLOCKS, HEAD_COPIES, HIDDEN_COPIES, MLP_COPIES = 4, 24, 8, 3


@dataclass(frozen=True)
class Route:
    """How the weights get from the source to the checkpoint: `peak_bytes` beside Python and its libraries, None if unknown."""

    streamed: bool
    reason: str
    peak_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        return {"streamed": self.streamed, "reason": self.reason, "peak_bytes": self.peak_bytes}


def route(source: Source) -> Route:
    """Safetensors, in a folder or on the hub, are streamed; a GGUF file is unpacked whole, a model in memory is there already."""
    if source.format == "gguf":
        return Route(False, "a GGUF file is unpacked whole", None)
    if source.format == "memory":
        return Route(False, "the model is in memory already", None)
    return Route(True, "", peak_bytes(source.config, header_shapes(source)))


def header_shapes(source: Source) -> dict[str, list[int]]:
    """Shapes of the source's tensors; of a model that is still on the hub, the embedding's alone."""
    if source.format == "folder" and source.path is not None:
        return {name: entry["shape"] for path in weight_files(source.path) for name, entry in safetensors_header(path).items()}
    return {"embed_tokens.weight": [source.config["vocab_size"], source.config["hidden_size"]]}


def peak_bytes(config: Mapping[str, Any], shapes: Mapping[str, list[int]]) -> int:
    """The most that is in memory at once: the largest tensor and the activations of a layer's start, or a shard being written."""
    sizes = [elements(shape) for shape in shapes.values()]
    shard = min(WIDEST * sum(sizes), max(SHARD_BYTES, WIDEST * max(sizes)))
    return max(shard, WIDEST * max(sizes) + activation_bytes(config))


def elements(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def activation_bytes(config: Mapping[str, Any]) -> int:
    """What the start of a layer holds in fp32: hidden states, the MLP's, q, k, v and features of each head, a block of scores."""
    tokens, hidden, heads = CALIBRATION_ROWS * CALIBRATION_LENGTH, int(config["hidden_size"]), int(config["num_attention_heads"])
    width = heads * int(config.get("head_dim") or hidden // heads)
    scores = SCORE_BLOCKS * CALIBRATION_ROWS * heads * ROW_BLOCK * CALIBRATION_LENGTH
    streams = HIDDEN_COPIES * hidden + MLP_COPIES * int(config.get("intermediate_size") or 4 * hidden) + HEAD_COPIES * width
    return WIDEST * (tokens * streams + scores)
