"""What is asked for far back: generated, seeded, at least three windows away, told apart from what distillation teaches."""

from __future__ import annotations

import re
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
from cli.tiny import TEXT, tokenizer

from linearize.errors import UsageError
from linearize.evaluation.reading import Variant
from linearize.evaluation.recall import TASKS, TOKENS_AT_ONCE, Grid, Prompt, batches, by_length, prompt, retrieval, scores_of
from linearize.evaluation.recall_forms import ASKED, FORMS, LEARNT, PEOPLE, Writer
from linearize.evaluation.recall_rows import TASKS as TAUGHT
from linearize.testing.models import tiny_llama

ESSAY = list(tokenizer()(TEXT)["input_ids"])


def said(ids: list[int]) -> str:
    return str(tokenizer().decode(ids))


def letters(text: str) -> str:
    """And digits, without what stands between them."""
    return "".join(filter(str.isalnum, text))


def made(task: str, length: int = 1500, depth: float = 0.5, distance: int = 300, seed: str = "0") -> Prompt:
    found = prompt(task, tokenizer(), ESSAY, length, depth, distance, seed)
    assert found is not None
    return found


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_hides_what_it_asks_for(task: str) -> None:
    """Exactly as long as asked; the answer's tokens marked; every hidden word far before the question, as deep as told."""
    for depth in (0.0, 0.5, 1.0):
        one = made(task, depth=depth)
        assert len(one.ids) == 1500
        question = len(one.ids) - len(one.told)
        assert one.told[-1]
        assert question - one.end_of_hidden >= 300
        around = question - one.end_of_hidden - 300
        share = around / (question - 300)  # about the part of the text that depth leaves after the hidden words
        assert share == pytest.approx(1 - depth, abs=0.45 if task in ("mqar", "multi-key", "variable-tracking") else 0.3)
        asked = FORMS[task](Writer(tokenizer(), f"{task}-1500-{depth}-0", ASKED))
        before = said(one.ids[: one.end_of_hidden])
        assert all(piece.strip() in before for piece in asked.hidden)
        told = [said([x]) for x, t in zip(one.ids[question:], one.told, strict=True) if t]
        assert all(any(map(str.isalnum, word)) for word in told)
        assert letters("".join(told)) == letters(asked.answer)
        assert all(piece.strip() not in said(one.ids[one.end_of_hidden : question]) for piece in asked.hidden)


@pytest.mark.parametrize("task", [*TASKS, "key-value", "fact"])
def test_the_answer_follows_from_what_is_hidden(task: str) -> None:
    """Found again by rule from the hidden pieces alone; another seed has another answer, the same seed the same."""
    answers = set()
    for seed in range(10):
        asked = FORMS[task](Writer(tokenizer(), str(seed), ASKED))
        hidden = "".join(asked.hidden)
        if task == "chain":
            where: dict[str, str] = {}
            holder = ""
            for sentence in re.findall(r"\w[^.]*\.", hidden):
                who, rest = sentence.split(" ", 1)
                assert who in PEOPLE
                holder = who if "took" in rest else holder
                where[who] = where[who] if "took" in rest else rest.split()[-1].rstrip(".")
            expected = f" {where[holder]}"
        elif task == "variable-tracking":
            value, first = re.findall(r"VAR (\w+) = (\d+)", hidden)[0][::-1]
            assert value in asked.question
            handed = dict(tuple(reversed(pair)) for pair in re.findall(r"VAR (\w+) = VAR (\w+)", hidden))
            names = [first]
            while names[-1] in handed:
                names.append(handed[names[-1]])
            expected = " " + ", ".join(names)
        elif task == "mqar":
            held = dict(re.findall(r"(\w+) = (\d+);", hidden))
            names = [words.strip(" =;\n").split()[-1] for words, told in asked.end if not told and "=" in words]
            expected = "".join(f" {held[name]}" for name in names)
        else:
            expected = asked.answer
            assert expected.strip() in hidden
            if task in ("s-niah-1", "s-niah-2", "s-niah-3", "multi-key"):
                name = re.findall(r"for (\w+) mentioned", asked.question)[0]
                assert f"for {name} is:{expected}." in hidden
        assert asked.answer == expected
        answers.add(asked.answer)
        assert FORMS[task](Writer(tokenizer(), str(seed), ASKED)) == asked
    assert len(answers) > (2 if task == "chain" else 4)


def test_training_never_shows_what_the_evaluation_asks_for() -> None:
    """Not a number, name or city of the one occurs in the other, in any form."""
    assert not set(LEARNT.digits) & set(ASKED.digits)
    assert not set(LEARNT.names + LEARNT.cities) & set(ASKED.names + ASKED.cities)
    numbers: list[set[str]] = []
    for tasks, words in ((TAUGHT, LEARNT), (TASKS, ASKED)):
        drawn = [FORMS[task](Writer(tokenizer(), str(seed), words)) for task in tasks for seed in range(20)]
        numbers.append({n for x in drawn for n in re.findall(r"(?<!-)\b\d+\b(?!-)", x.question + "".join(x.hidden))})
    assert min(map(len, numbers)) > 50
    assert not numbers[0] & numbers[1]
    assert "chain" not in TAUGHT  # whose people and places are the same for all


def test_too_short_a_text_is_left_out_and_an_unknown_task_refused() -> None:
    assert prompt("pass-key", tokenizer(), ESSAY, 400, 0.5, 390, "0") is None
    with pytest.raises(UsageError, match="no recall task 'niah'"):
        Grid(tasks=("niah",))


class Reciter(torch.nn.Module):
    """Knows the texts by heart and says what comes next, wrong at some positions; after a token that is not the text's, 0."""

    def __init__(self, texts: list[list[int]], wrong: set[int]) -> None:
        super().__init__()
        self.texts, self.wrong, self.calls = texts, wrong, 0
        self.config = tiny_llama().config
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Any, position_ids: Any, past_key_values: Any, **_: Any) -> Any:
        self.calls += 1
        logits = torch.zeros(len(input_ids), 1, 400)
        for row, text in enumerate(self.texts):
            position, token = int(position_ids[row, -1]), int(input_ids[row, -1])
            known = token == text[position] and position + 1 not in self.wrong
            logits[row, 0, text[position + 1] if known and position + 1 < len(text) else 0] = 1
        past_key_values.update(torch.zeros(1, 2, input_ids.shape[1], 8), torch.zeros(1, 2, input_ids.shape[1], 8), 0)
        return type("Out", (), {"logits": logits})


def test_a_score_counts_the_answer_and_nothing_else() -> None:
    """Of several prompts side by side: what is given is not counted, as a space is; a digit that went wrong spoils what follows."""
    prompts = [made("mqar", seed=seed) for seed in "01"]
    texts = [one.ids for one in prompts]
    ends = [len(one.ids) - len(one.told) for one in prompts]
    told = [[end + i for i, t in enumerate(one.told) if t] for end, one in zip(ends, prompts, strict=True)]
    assert all(any(map(str.isdigit, said([text[i]]))) for text, where in zip(texts, told, strict=True) for i in where)
    given = set(range(min(ends), 1500)) - set(told[0]) - set(told[1])
    reciter = Reciter(texts, given | {3, min(ends) - 1})
    assert scores_of(Variant("", reciter, nullcontext), prompts) == [1.0, 1.0]
    assert reciter.calls == 2 + max(len(one.told) - one.told.index(True) for one in prompts) - 1  # one reading, then a token each
    last_answer = max(i for i in told[0] if i - 1 not in told[0])
    last_word = [i for i in told[0] if i >= last_answer]
    spoiled = Reciter(texts[:1], {last_word[0]})  # the first digit of the last answer: the others follow from it
    assert scores_of(Variant("", spoiled, nullcontext), prompts[:1]) == [pytest.approx(1 - len(last_word) / len(told[0]))]


def test_prompts_of_other_tasks_beside_it_change_no_score() -> None:
    """Some answers are longer than others: where those end, the rest of the text is given."""
    asked = [made(task, seed="0") for task in ("copying", "pass-key", "mqar", "s-niah-3")]
    texts = [one.ids for one in asked]
    wrong = {len(texts[0]) - 1, len(texts[0]) - 4}
    together = scores_of(Variant("", Reciter(texts, wrong), nullcontext), asked)
    alone = [scores_of(Variant("", Reciter([one.ids], wrong), nullcontext), [one])[0] for one in asked]
    assert together == alone
    assert all(0 < share < 1 for share in alone)


def test_every_prompt_is_in_one_batch_with_others_of_its_length() -> None:
    """As many as may be read at once, and those with the longest answers together."""
    asked = [made(task, seed=str(i), length=length) for i in range(3) for task in TASKS for length in (1500, 3000)]
    found = batches(asked)
    assert sorted(i for some in found for i in some) == list(range(len(asked)))
    lengths = [{len(asked[i].ids) for i in some} for some in found]
    assert all(len(own) == 1 and len(some) * max(own) <= TOKENS_AT_ONCE for own, some in zip(lengths, found, strict=True))
    answers = [
        len(asked[i].told) - asked[i].told.index(True)
        for some, own in zip(found, lengths, strict=True)
        if own == {1500}
        for i in some
    ]
    assert answers[-1] == max(answers) > 2 * answers[0]
    assert len(found) == 6 + 14  # of at most five and two


def test_the_grid_of_a_model_that_knows_nothing() -> None:
    """A row for each task, length and depth; over depths, their mean."""
    base = tiny_llama(vocab_size=300)
    grid = Grid(("pass-key", "copying"), (600, 700), (0.0, 1.0), 2)
    seen: list[tuple[int, int]] = []
    both = {name: Variant(name, base) for name in ("teacher", "student")}
    rows = retrieval(both, tokenizer(), [TEXT], grid, 16, lambda done, total: seen.append((done, total)))
    assert len(rows) == 8
    assert seen[-1] == (32, 32)
    assert all(a[0] < b[0] for a, b in pairwise(seen))
    assert all(row["samples"] == 2 and row["scores"]["student"] == row["scores"]["teacher"] for row in rows)
    first, both_depths = by_length(rows)[0], rows[:2]
    mean = sum(row["scores"]["student"]["accuracy"] for row in both_depths) / 2
    assert first["samples"] == 4
    assert first["scores"]["student"]["accuracy"] == pytest.approx(mean)
    assert first["scores"]["student"]["interval"][1] > 0.4
