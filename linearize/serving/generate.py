"""Streaming generation on transformers' generate(), with speed and memory counted; shared by chat, generate and the demo."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from linearize.devices import let_threads_go
from linearize.loading import load
from linearize.modeling.plans import plan_layers
from linearize.modeling.spec import Shape
from linearize.opening import need_decoder
from linearize.progress import Progress, silent
from linearize.serving.nucleus import Nucleus

PREFILL_CHUNK = 2048
KV_BYTES = 2  # a softmax cache in 16 bits
OF_NO_PAST = {  # what a generation config may say that does not look at the tokens before
    "transformers_version", "_from_model_config", "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id",
    "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "max_length", "max_new_tokens", "use_cache",
    "output_attentions", "output_hidden_states",
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Sampling: temperature 0 is greedy; the same seed gives the same text."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def to_generate(self) -> dict[str, Any]:
        if self.temperature <= 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        nucleus = [Nucleus(self.top_p)] if self.top_p < 1 else []
        return {
            "do_sample": True, "temperature": self.temperature, "top_p": None, "top_k": 0,
            "logits_processor": LogitsProcessorList(nucleus),
        }  # fmt: skip


class _Stop(StoppingCriteria):
    """Ends generation between two tokens when asked to, and notes when the first one came."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.first_token: float | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.first_token = self.first_token or time.monotonic()
        return torch.full((input_ids.shape[0],), self.asked.is_set(), device=input_ids.device)


@dataclass(frozen=True)
class Run:
    """How a checkpoint runs: its weights in `dtype` (auto keeps the stored one) or in 8 bits, its steps compiled or not."""

    device: str = "auto"
    dtype: str = "auto"
    int8: bool = False
    compiled: bool = False


def open_generator(directory: Path, run: Run | None = None, report: Progress = silent) -> Generator:
    """A checkpoint ready to generate. `report` hears of a step that must be compiled first; UsageError where that cannot be."""
    run = run or Run()
    model, tokenizer = load(directory, dtype=run.dtype, device=run.device)
    made = Generator(model, tokenizer)
    if run.int8:
        from linearize.serving.int8 import quantize

        quantize(model)
    if run.compiled:
        from linearize.serving.compiled import compile_step

        compile_step(model, report=report)
    return made


@dataclass
class Generator:
    """A model and its tokenizer; `stream` continues token ids on a cache, leaves them all in `sequence` and figures in `last`."""

    model: Any
    tokenizer: Any
    last: dict[str, Any] = field(default_factory=dict)
    sequence: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    _stop: _Stop = field(default_factory=_Stop)
    # the same thread for all answers: each new one may take another of malloc's arenas, and a long talk would grow all of them
    _worker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def __post_init__(self) -> None:
        need_decoder(self.model.config.linearize, type(self.model).__name__, "generation is")

    def new_cache(self) -> Any:
        return DynamicCache(config=self.model.config)

    def stop(self) -> None:
        """End the running answer after the token in work."""
        self._stop.asked.set()

    def read(self, ids: Tensor, cache: Any) -> None:
        """Let the cache take in `ids` (T,), the first of which it holds."""
        for start in range(cache.get_seq_length(), len(ids), PREFILL_CHUNK):
            chunk = ids[None, start : start + PREFILL_CHUNK].to(self.model.device)
            positions = torch.arange(start, start + chunk.shape[1], device=self.model.device)[None]
            with torch.no_grad():
                self.model(input_ids=chunk, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def stream(self, ids: Tensor, cache: Any, settings: Settings) -> Iterator[str]:
        """Pieces of text that follow `ids` (T,), the first of which the cache holds; afterwards `sequence` is all of it.

        generate() is given the last chunk of `ids`, since it copies what it has at every token; the whole where penalties of the
        generation config count them.
        """
        self._stop = _Stop()
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        known, began = cache.get_seq_length(), time.monotonic()
        self.sequence = ids  # what was there before is let go of: it is as long
        last = known + (len(ids) - known - 1) // PREFILL_CHUNK * PREFILL_CHUNK
        first = 0 if self.model.generation_config.to_diff_dict().keys() - OF_NO_PAST else last
        inputs = ids[None, first:].to(self.model.device)
        mask = torch.ones(1, len(ids), dtype=torch.bool, device=inputs.device)  # of what the cache has read too
        positions = torch.arange(last, len(ids), device=inputs.device)[None]  # it would number all of a long talk at every token

        def work() -> Tensor:
            try:
                with torch.no_grad(), torch.random.fork_rng(devices=[]):
                    torch.manual_seed(settings.seed)
                    if last > known:
                        self.read(ids[:last], cache)
                    sequences: Tensor = self.model.generate(
                        inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, streamer=streamer,
                        max_new_tokens=settings.max_tokens,
                        stopping_criteria=StoppingCriteriaList([self._stop]),
                        pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id, **settings.to_generate(),
                    )  # fmt: skip
                return torch.cat([ids[:first], sequences[0].cpu()])
            except BaseException:
                streamer.end()  # whoever reads waits for it
                raise
            finally:
                let_threads_go()

        let_threads_go()  # of the two threads one computes at a time
        working = self._worker.submit(work)
        try:
            yield from (piece for piece in streamer if piece)
        finally:  # whoever reads may have had enough
            self.stop()
            wait([working])
        self.sequence = working.result()
        self.last = self._figures(len(ids) - known, len(self.sequence) - len(ids), len(self.sequence), began, cache)

    def _figures(self, prompt: int, new: int, total: int, began: float, cache: Any) -> dict[str, Any]:
        now, first = time.monotonic(), self._stop.first_token or time.monotonic()
        layers = [layer for layer in cache.layers if getattr(layer, "is_linearize_layer", False)]
        plan = self.model.config.linearize
        shape = Shape(**plan_layers(plan)[0]["shape"])
        width = shape.kv_heads * (shape.head_dim + shape.value_dim) * (len(plan["layers"]) + plan["softmax_layers"])
        return {
            "tokens": new,
            "tokens_per_second": (new - 1) / (now - first) if new > 1 and now > first else None,
            "prefill_tokens": prompt,
            "prefill_tokens_per_second": prompt / max(first - began, 1e-9),
            "state_bytes": sum(layer.nbytes for layer in layers),
            "kv_bytes": total * width * KV_BYTES,
            "context": total,
        }


class Completion:
    """Plain continuation of a prompt by a checkpoint."""

    def __init__(self, directory: Path, run: Run | None = None, report: Progress = silent) -> None:
        self.generator = open_generator(directory, run, report)

    @property
    def last(self) -> dict[str, Any]:
        return self.generator.last

    def stream(self, prompt: str, settings: Settings) -> Iterator[str]:
        """Pieces of the continuation of `prompt`."""
        ids = self.generator.tokenizer(prompt)["input_ids"] or [self.generator.tokenizer.bos_token_id or 0]
        return self.generator.stream(torch.tensor(ids), self.generator.new_cache(), settings)
