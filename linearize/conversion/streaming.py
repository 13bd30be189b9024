"""Which sources are converted without ever being whole in memory, and what that takes. Torch-free: the plan says it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from linearize.conversion.architectures import Architecture
from linearize.conversion.preflight import safetensors_header, weight_files
from linearize.conversion.sources import Source
from linearize.methods.base import ROW_BLOCK
from linearize.modeling.spec import MixerSpec, Shape

CALIBRATION_ROWS, CALIBRATION_LENGTH = 2, 1024
SCORE_ROWS, SCORE_LENGTH = 24, 4096  # more and longer ones where slots go by a learnt score, which must know long texts
FEWEST_ROWS = 4  # of such a length, or shorter ones must do
MOST_ROWS = 30  # of them, however short
RANKED_LENGTH = 512  # of those rows, when the layers to keep are looked for
SHARD_BYTES = 1_000_000_000  # a checkpoint is written in files of at most this size
WIDEST = 4  # bytes: nothing is held in more than fp32
MLP_MATRICES = 3
SCORE_BLOCKS, HEAD_COPIES, HIDDEN_COPIES, MLP_COPIES = 4, 24, 8, 3


@dataclass(frozen=True)
class Route:
    """How the weights get from the source to the checkpoint: `peak_bytes` beside Python and its libraries, None if unknown."""

    streamed: bool
    reason: str
    peak_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        return {"streamed": self.streamed, "reason": self.reason, "peak_bytes": self.peak_bytes}


def route(source: Source, family: Architecture, tokens: int = CALIBRATION_ROWS * CALIBRATION_LENGTH) -> Route:
    """Safetensors, in a folder or on the hub, are streamed; a GGUF file is unpacked whole, a model in memory is there already."""
    if source.format == "gguf":
        return Route(False, "a GGUF file is unpacked whole", None)
    if source.format == "memory":
        return Route(False, "the model is in memory already", None)
    shape, mlp = family.shape(source.config), family.mlp_width(source.config)
    return Route(True, "", peak_bytes(shape, mlp, tensor_sizes(source, family), tokens))


def tensor_sizes(source: Source, family: Architecture) -> list[int]:
    """Elements of the model's tensors: from the headers of its files or, where none is here, of those that its config tells."""
    config = source.config
    if source.format == "folder" and source.path is not None:
        return [prod(entry["shape"]) for path in weight_files(source.path) for entry in safetensors_header(path).values()]
    if "parameters" in config:  # a GGUF file was counted when its config was read
        return [int(config["parameters"])]
    shape, experts = family.shape(config), int(config.get("num_local_experts") or config.get("num_experts") or 1)
    vocabulary = [int(config["vocab_size"]) * shape.hidden_size] * (1 if config.get("tie_word_embeddings") else 2)
    heads = [shape.hidden_size * count * shape.head_dim for count in (shape.heads, shape.kv_heads) for _ in range(2)]
    mlp = [shape.hidden_size * expert_width(config, family)] * MLP_MATRICES * experts
    return vocabulary + (heads + mlp) * family.layers(config)


def expert_width(config: Mapping[str, Any], family: Architecture) -> int:
    """Width of one feed-forward network, of which a mixture has several."""
    return int(config.get("moe_intermediate_size") or family.mlp_width(config))


def calibration_shape(
    mixers: Iterable[MixerSpec], documents: Sequence[int] = (SCORE_LENGTH,) * SCORE_ROWS, wanted: int | None = None
) -> tuple[int, int]:
    """Rows and their length that these mixers ask for, of documents of so many tokens.

    A learnt score takes the longest rows, up to 4,096 tokens, of which the documents hold enough, and of these what they hold; or
    rows of the `wanted` length. ValueError where they hold too few of those.
    """
    longest = max(max(documents), 2)
    if not any(mixer.scores_learned for mixer in mixers):
        return CALIBRATION_ROWS, min(CALIBRATION_LENGTH, longest)
    for length in (wanted,) if wanted else (SCORE_LENGTH, SCORE_LENGTH // 2, min(SCORE_LENGTH // 4, longest)):
        fewest, most = (CALIBRATION_ROWS + rows_of(n * SCORE_LENGTH, length) for n in (FEWEST_ROWS, SCORE_ROWS))
        there, needed = sum(size // length for size in documents), fewest - asking(fewest)
        if there >= needed:
            break
    if wanted and there < needed:
        raise ValueError(f"{there} rows of {wanted:,} tokens lie inside one document, and at least {needed} are needed")
    return max(fewest, min(most, 2 * there - CALIBRATION_ROWS)), length


def rows_of(tokens: int, length: int) -> int:
    """In how many rows of that length so many tokens are fitted to."""
    return min(max(tokens // length, FEWEST_ROWS), MOST_ROWS)


def started_on(mixer: MixerSpec, length: int) -> tuple[int, int]:
    """On how many rows of that length a mixer is started, and on how many tokens of each, from the first.

    A memory behind slots whose score is learnt needs 4,096 tokens of whole rows: of the first thousand few would get into it.
    """
    return (max(SCORE_LENGTH // length, 1), length) if mixer.scores_learned else (CALIBRATION_ROWS, min(CALIBRATION_LENGTH, length))


def started_rows(mixers: Iterable[MixerSpec], length: int) -> int:
    """How many rows are seen at once, for all of these mixers to be started."""
    return max(started_on(mixer, length)[0] for mixer in mixers)


def tokens_at_once(mixers: Collection[MixerSpec]) -> int:
    """Tokens of these rows."""
    length = calibration_shape(mixers)[1]
    return started_rows(mixers, length) * length


def asking(rows: int) -> int:
    """How many of the calibration rows ask for something at their end."""
    return (rows - CALIBRATION_ROWS) // 2


def peak_bytes(shape: Shape, mlp: int, sizes: list[int], tokens: int = CALIBRATION_ROWS * CALIBRATION_LENGTH) -> int:
    """The most that is in memory at once: the largest tensor and the activations of a layer's start, or a shard being written.

    `sizes` are the elements of the model's tensors, `mlp` the width of its feed-forward layers, `tokens` what the start looks at.
    """
    shard = min(WIDEST * sum(sizes), max(SHARD_BYTES, WIDEST * max(sizes)))
    return max(shard, WIDEST * max(sizes) + activation_bytes(shape, mlp, tokens))


def activation_bytes(shape: Shape, mlp: int, tokens: int = CALIBRATION_ROWS * CALIBRATION_LENGTH) -> int:
    """What the start of a layer holds in fp32: hidden states, the MLP's, q, k, v and features of each head, a block of scores."""
    scores = SCORE_BLOCKS * tokens * shape.heads * ROW_BLOCK
    streams = HIDDEN_COPIES * shape.hidden_size + MLP_COPIES * mlp + HEAD_COPIES * shape.heads * shape.head_dim
    return WIDEST * (tokens * streams + scores)
