"""Pass-key retrieval: digits hidden in filler, asked for at the end. Generated from a seed, nothing is downloaded."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from linearize.evaluation.perplexity import Variant

FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. ",
    "The road winds down to the river. A boat waits at the pier. Nobody is on board yet. ",
    "Morning came slowly over the hills. The baker lit his oven. The street smelled of bread. ",
)
DIGITS = 5


@dataclass(frozen=True)
class PassKey:
    """Token ids of a prompt of exactly `length` tokens with its answer appended, and how many tokens the answer has."""

    ids: list[int]
    answer: int


def pass_key(tokenizer: Any, length: int, depth: float, seed: int) -> PassKey:
    """One prompt with the key at `depth` (0 is the start) of its filler."""
    draw = random.Random(f"{seed}-{length}-{depth}")
    key = "".join(draw.choice("0123456789") for _ in range(DIGITS))

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    head = encode("There is a pass key hidden inside a lot of text. Find it and remember it.\n")
    needle = encode(f" The pass key is {key}. Remember it. {key} is the pass key. ")
    question = encode("\nWhat is the pass key? The pass key is")
    answer = encode(f" {key}")
    room = length - len(head) - len(needle) - len(question) - len(answer)
    if room < 0:
        raise ValueError(f"a pass-key prompt needs at least {length - room} tokens, got {length}")
    filler: list[int] = []
    while len(filler) < room:
        filler.extend(encode(draw.choice(FILLER)))
    cut = int(room * depth)
    return PassKey(head + filler[:cut] + needle + filler[cut:room] + question + answer, len(answer))


def digits_recovered(variant: Variant, prompt: PassKey) -> float:
    """Share of the answer's tokens that are the model's first choice, each given the true ones before it."""
    device = next(variant.model.parameters()).device
    ids = torch.tensor([prompt.ids], device=device)
    with torch.no_grad(), variant.context():
        logits = variant.model(input_ids=ids, use_cache=False, logits_to_keep=prompt.answer + 1).logits[0, :-1]
    return float((logits.argmax(-1) == ids[0, -prompt.answer :]).float().mean())


def retrieval(
    variants: dict[str, Variant],
    tokenizer: Any,
    lengths: tuple[int, ...],
    samples: int,
    seed: int,
    report: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    """Mean share of digits by length and variant, over depths spread evenly through the text."""
    rows, done, total = [], 0, len(lengths) * samples * len(variants)
    for length in lengths:
        prompts = [pass_key(tokenizer, length, (i + 0.5) / samples, seed) for i in range(samples)]
        row: dict[str, Any] = {"length": length, "samples": samples}
        for name, variant in variants.items():
            scores = []
            for prompt in prompts:
                scores.append(digits_recovered(variant, prompt))
                done += 1
                report(done, total)
            row[name] = sum(scores) / len(scores)
        rows.append(row)
    return rows
