"""Measuring a process's memory: each question is asked in a process of its own, since a peak never goes down.

`python -m linearize.benchmarks.probe KIND JSON` answers with one line of JSON.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from linearize.benchmarks.training import attention_step, teacher_pass
from linearize.conversion.teacher import unconverted
from linearize.devices import forget_peak, held_memory, peak_memory
from linearize.documents import BUILTIN, documents
from linearize.errors import ResourceError
from linearize.evaluation.reading import Reader, Variant
from linearize.evaluation.speed import random_ids
from linearize.loading import load
from linearize.modeling.native import give_back
from linearize.serving.session import Session, Settings

ANSWER = 8  # tokens that each turn of a talk is answered with
STEPS = 2  # of training: the first one makes the optimizer's moments
SO_FAR = "so far: "
Answer = dict[str, Any]


def probe(kind: str, directory: Path, report: Callable[[int, int], None] = lambda done, total: None, /, **settings: Any) -> Answer:
    """Ask in a fresh process; bytes in the answer are those of its memory. ResourceError where it does not live to tell.

    `report` hears how far it has come, where it takes long.
    """
    words = [sys.executable, "-m", __name__, kind, json.dumps({"directory": str(directory), **settings})]
    said, pipe = [], subprocess.PIPE
    with subprocess.Popen(words, text=True, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe) as process:
        for line in process.stderr or ():
            if line.startswith(SO_FAR):
                report(*map(int, line.removeprefix(SO_FAR).split()))
            elif line.strip():
                said.append(line.strip())
        answer = process.stdout.read() if process.stdout else ""
    if process.returncode:
        why = "it was killed: out of memory?" if process.returncode < 0 else said[-1] if said else f"exit code {process.returncode}"
        raise ResourceError(f"the process that measures memory ended: {why}", f"bench, {kind}", "a shorter --sequence or --long")
    return json.loads(answer.splitlines()[-1])  # type: ignore[no-any-return]


def loaded(settings: dict[str, Any]) -> tuple[Any, Any, Answer]:
    """Model, tokenizer and what is held before anything is done with them; peaks count from here."""
    model, tokenizer = load(settings["directory"], dtype=settings["dtype"], device=settings["device"])
    gc.collect()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    give_back()
    known = forget_peak(model.device)
    return model, tokenizer, {"weights": weights, "loaded": held_memory(model.device), "loading_counts": not known}


def peak(model: Any, facts: Answer) -> Answer:
    """The peak, and what of it is above the weights: the process itself included."""
    found = peak_memory(model.device)
    return {**facts, "peak": found, "above_weights": found - facts["weights"]}


def of_teacher(settings: dict[str, Any]) -> Answer:
    """A forward pass of the stock model over one row."""
    model, _, facts = loaded(settings)
    ids = random_ids(model.config.vocab_size, settings["sequence"]).to(model.device)
    run = teacher_pass(unconverted(model), ids)
    for _ in range(STEPS):
        run()
    return peak(model, facts)


def of_attention(settings: dict[str, Any]) -> Answer:
    """Steps of attention transfer on one row."""
    model, _, facts = loaded(settings)
    ids = random_ids(model.config.vocab_size, settings["sequence"]).to(model.device)
    step = attention_step(model, ids)
    for _ in range(STEPS):
        step()
    return peak(model, facts)


def of_prefill(settings: dict[str, Any]) -> Answer:
    """A long text, read a chunk at a time."""
    model, _, facts = loaded(settings)
    reader, tokens = Reader(Variant("student", model)), settings["tokens"]
    reader.feed(random_ids(model.config.vocab_size, tokens), settings["chunk"])
    return peak(model, {**facts, "tokens": tokens, "chunk": settings["chunk"], "state": reader.nbytes()})


def of_talk(settings: dict[str, Any]) -> Answer:
    """A talk in turns of `turn` tokens and a short answer: the peak once its state has taken in each of `tokens`."""
    model, tokenizer, facts = loaded(settings)
    session, peaks = Session.of(model, tokenizer), []
    words = tokenizer(" ".join(documents(BUILTIN)), add_special_tokens=False, verbose=False)["input_ids"]
    said = tokenizer.decode(words[: settings["turn"]])
    for wanted in settings["tokens"]:
        while session.last.get("context", 0) < wanted:
            for _ in session.ask(said, Settings(max_tokens=ANSWER)):
                pass
            so_far, whole = session.last["context"], settings["tokens"][-1]
            print(f"{SO_FAR}{min(so_far, whole)} {whole}", file=sys.stderr, flush=True)  # noqa: T201
        peaks.append({"tokens": session.last["context"], "turns": len(session.history) // 2, **peak(model, facts)})
    return {**facts, "peaks": peaks, "state": session.last["state_bytes"], "kv": session.last["kv_bytes"]}


KINDS: dict[str, Callable[[dict[str, Any]], Answer]] = {
    "teacher": of_teacher, "attention": of_attention, "prefill": of_prefill, "talk": of_talk
}  # fmt: skip


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps(KINDS[sys.argv[1]](json.loads(sys.argv[2]))))  # noqa: T201
