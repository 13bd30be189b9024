"""Text in the teacher's own words, many documents at a time: a document depends on the seed and its number alone.

A document begins with nothing but its start, as the text begins that the teacher was trained on: an open turn of the user in its
chat template (Magpie, Xu et al. 2024, arXiv 2406.08464), the token that begins documents, or a token drawn from the vocabulary
(LLM-QAT, Liu et al. 2023, arXiv 2305.17888). Tokens are drawn at temperature 1 from those with at least MIN_P of the likeliest
one's probability (Nguyen et al. 2024, arXiv 2407.01082).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from linearize.conversion.calibration import few_logits
from linearize.distillation.stages import first_position
from linearize.modeling.modeling_linearized import mode

MIN_P = 0.05
SHORTEST = 2  # tokens of a document or of a turn: it cannot end before
MARKS = [f"[[turn {i}]]" for i in range(3)]
Agree = Callable[[bool], bool]


@dataclass(frozen=True)
class Opening:
    """How documents begin: with these tokens, or with one drawn from `vocabulary` after them.

    A text leaves the first `hidden` of them out. What the template says between turns is in `turns`, for each in turn: where
    there is nothing, a document ends with its first turn.
    """

    tokens: tuple[int, ...]
    vocabulary: tuple[int, ...] = ()
    hidden: int = 0
    turns: tuple[tuple[int, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.tokens) + bool(self.vocabulary)


def openings(tokenizer: Any, length: int) -> list[Opening]:
    """Those that the tokenizer has, which documents of `length` tokens take in turn."""
    found, chat = [], chat_opening(tokenizer)
    inside = () if chat is None else (*chat.tokens[1:], *chat.turns[0], *chat.turns[1])
    begins = [x for x in (tokenizer.bos_token_id, tokenizer.eos_token_id) if x is not None and x not in inside]
    begin = tuple(begins[:1])  # not one that begins or ends turns
    if chat is not None and 2 * len(chat) <= length:
        found.append(chat)
    if begin:
        found.append(Opening(begin, hidden=1))
    return [*found, Opening(begin, vocabulary=words(tokenizer), hidden=len(begin))]


def chat_opening(tokenizer: Any) -> Opening | None:
    """An open turn of the user, and what the template puts between turns; None without a template that can be read so."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, MARKS, strict=True)]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # a template is a program: this one wants other conversations
        return None
    pieces = []
    for mark in MARKS:
        piece, found, text = text.partition(mark)
        if not found:
            return None
        pieces.append(tuple(tokenizer(piece, add_special_tokens=False)["input_ids"]))
    return Opening(pieces[0], turns=(pieces[1], pieces[2])) if all(pieces) else None


def words(tokenizer: Any) -> tuple[int, ...]:
    """Tokens that are a text of their own."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = [i for i in range(len(tokenizer)) if i not in special]
    texts = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    return tuple(i for i, text in zip(ids, texts, strict=True) if text.strip() and "\ufffd" not in text)


def ends(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a turn or a document."""
    said = getattr(model.generation_config, "eos_token_id", None)
    every = [tokenizer.eos_token_id, *(said if isinstance(said, list) else [said])]
    return {int(x) for x in every if x is not None}


@dataclass
class Document:
    """One in the making: its tokens so far, what the template is about to say, how long its turn is."""

    opening: Opening
    length: int
    draws: Tensor  # (length,) uniform, fp64
    tokens: list[int]
    queue: list[int] = field(default_factory=list)
    turn: int = 0
    turns: int = 0
    done: bool = False

    @classmethod
    def begun(cls, opening: Opening, length: int, seed: int, index: int) -> Document:
        draw = torch.Generator().manual_seed(seed * 1_000_003 + index)
        words = opening.vocabulary
        first = [words[int(torch.randint(len(words), (), generator=draw))]] if words else []
        draws = torch.rand(length, generator=draw, dtype=torch.float64)
        return cls(opening, length, draws, [*opening.tokens, *first])

    def take(self, token: int, stops: set[int]) -> None:
        """The teacher's next token, in whose place the template may speak."""
        if self.done:
            return
        if not self.queue and token in stops:
            if not self.opening.turns:
                self.done = True
                return
            self.queue = list(self.opening.turns[self.turns % len(self.opening.turns)])
            self.turns, self.turn = self.turns + 1, 0
        if self.queue:
            token = self.queue.pop(0)
        else:
            self.turn += 1
        self.tokens.append(token)
        self.done = len(self.tokens) >= self.length

    @property
    def size(self) -> int:
        """Tokens of the text."""
        return len(self.tokens) - self.opening.hidden

    def text(self, tokenizer: Any) -> str:
        ids = self.tokens[self.opening.hidden :]
        said: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return said.rstrip("\ufffd")  # a letter that was cut


def drawn_tokens(logits: Tensor, draws: Tensor, banned: Tensor) -> list[int]:
    """One token for each row of logits (B, V), by its uniform draw (B,) on the cumulated probabilities; `banned` (B, V) are not."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    p = logits.to(dtype).masked_fill(banned, -torch.inf).softmax(-1)
    p = torch.where(p >= MIN_P * p.amax(-1, keepdim=True), p, 0.0)
    total = p.cumsum(-1, dtype=torch.float64)
    picked = torch.searchsorted(total, draws[:, None] * total[:, -1:], right=True)[:, 0]
    return picked.clamp(max=logits.shape[-1] - 1).tolist()


@dataclass
class Sampler:
    """A converted model's teacher and its tokenizer; `goes_on` makes one answer of what all processes say, if they run together."""

    model: Any
    tokenizer: Any
    length: int
    seed: int
    goes_on: Agree = bool

    def __post_init__(self) -> None:
        self.openings = openings(self.tokenizer, self.length)
        self.stops = ends(self.model, self.tokenizer)
        self.never = [i for i in self.tokenizer.all_special_ids if i not in self.stops]  # begins, pads

    def document(self, index: int) -> Document:
        """The start of a document."""
        return Document.begun(self.openings[index % len(self.openings)], self.length, self.seed, index)

    def sample(self, indices: Iterable[int], told: Callable[[int], None] = lambda tokens: None) -> list[Document]:
        """The documents of these numbers, whose starts must be of one length; `told` hears how many tokens each step adds."""
        documents = [self.document(i) for i in indices]
        running, device = documents, self.model.device
        cache = DynamicCache(config=self.model.config)
        given = torch.tensor([one.tokens for one in documents])
        with torch.no_grad(), mode(self.model, "teacher"):
            while self.goes_on(not all(one.done for one in documents)):
                logits = self._read(given.to(device), cache)
                draws = torch.stack([one.draws[min(len(one.tokens), self.length - 1)] for one in running]).to(device)
                for one, token in zip(running, drawn_tokens(logits, draws, self._banned(running, logits)), strict=True):
                    one.take(token, self.stops)
                told(sum(not one.done for one in running))
                left = [i for i, one in enumerate(running) if not one.done] or [0]
                if 2 * len(left) <= len(running):
                    cache.batch_select_indices(torch.tensor(left, device=device))
                    running = [running[i] for i in left]
                given = torch.tensor([[one.tokens[-1]] for one in running])
        return documents

    def _read(self, ids: Tensor, cache: Any) -> Tensor:
        """Logits (B, V) after new tokens (B, T) behind the cache."""
        batch, time = ids.shape
        seen = cache.get_seq_length()
        positions = (torch.arange(seen, seen + time, device=ids.device) + first_position(self.model)).expand(batch, -1)
        logits: Tensor = self.model(
            input_ids=ids, attention_mask=ids.new_ones(batch, seen + time), position_ids=positions, past_key_values=cache,
            use_cache=True, **few_logits(self.model),
        ).logits  # fmt: skip
        return logits[:, -1]

    def _banned(self, running: list[Document], logits: Tensor) -> Tensor:
        """Ends that would come too early, what never stands inside a text, rows of the embedding that are no token (B, V)."""
        banned = torch.zeros_like(logits, dtype=torch.bool)
        banned[:, len(self.tokenizer) :] = True
        banned[:, self.never] = True
        early = torch.tensor([one.turn < SHORTEST for one in running], device=logits.device)
        for stop in self.stops:
            banned[:, stop] |= early
        return banned
