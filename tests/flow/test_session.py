"""A talk: each turn reads what is new, the state is that of everything said, nothing of it is kept twice."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.tiny import TEMPLATE, TEXT, write_model
from torch import Tensor

from linearize.benchmarks.probe import probe
from linearize.conversion.convert import convert
from linearize.devices import let_threads_go
from linearize.loading import load
from linearize.serving import generate
from linearize.serving.generate import Generator, open_generator
from linearize.serving.session import SNAPSHOTS, Session, Settings

GREEDY = Settings(max_tokens=6)
WORDS = ["The sea is wide", "Seven ships", "and six of them", "came home", "again", "The night"]
TRIMMED = TEMPLATE.replace("{{ m['content'] }}", "{{ (m['content'] | trim)[:3] }}")  # writes less of the past than was said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    (root / "book.txt").write_text(TEXT, encoding="utf-8")
    source = write_model(root / "tiny", eos_token_id=None)
    return convert(str(source), output=root / "made", options={"window": 8}, calibration=root / "book.txt").path


class Watched:
    """A session; how many tokens each call of its generator had to read, and all that its cache has read, call by call."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, template: str | None) -> None:
        self.model, self.tokenizer = load(folder)
        self.tokenizer.chat_template = template
        self.session, self.read, self.known = Session.of(self.model, self.tokenizer), list[int](), list[list[int]]()
        for name in ("stream", "read"):
            monkeypatch.setattr(Generator, name, self.counting(getattr(Generator, name)))
        self.whole: list[int] = []
        self.model.get_input_embeddings().register_forward_pre_hook(self.note)

    def counting(self, call: Any) -> Any:
        def counted(own: Generator, ids: Tensor, cache: Any, *more: Any) -> Any:
            self.read.append(len(ids) - cache.get_seq_length())
            return call(own, ids, cache, *more)

        return counted

    def note(self, _: Any, inputs: tuple[Any, ...]) -> None:
        held = self.session._heard.cache.get_seq_length()
        self.known.append([*(self.known[-1][:held] if self.known else []), *inputs[0][0].tolist()])

    def ask(self, text: str, settings: Settings = GREEDY) -> str:
        self.read.clear()
        return "".join(self.session.ask(text, settings))

    def asked(self, text: str) -> str:
        """The tokens that an answer followed, as text; it is what a new cache gives after them."""
        answer = self.ask(text)
        prompt = self.known[-GREEDY.max_tokens]  # the call that gave the answer's first token
        assert len(prompt) == self.session.last["context"] - GREEDY.max_tokens
        model = load(Path(self.model.config._name_or_path))[0]
        model.generation_config = self.model.generation_config
        fresh = Generator(model, self.tokenizer)
        before = self.whole
        assert "".join(fresh.stream(torch.tensor(prompt), fresh.new_cache(), GREEDY)) == answer
        self.whole = fresh.sequence.tolist()
        if self.tokenizer.chat_template != TRIMMED:  # all that was said before, to the last token
            assert prompt[: len(before)] == before
        if self.whole[-1] in self.tokenizer.all_special_ids:
            self.whole.pop()
        return str(self.tokenizer.decode(prompt))


@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["template", "no template"])
def test_a_turn_reads_what_is_new(folder: Path, template: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the talk, and whatever tokens its answers were written in: a question costs its own tokens."""
    talk = Watched(folder, monkeypatch, template)
    longest = 0
    for turn in range(6 * SNAPSHOTS):
        talk.ask(WORDS[turn % len(WORDS)])
        assert len(talk.read) == 1, "nothing was read again"
        longest = max(longest, talk.read[0]) if turn < len(WORDS) else longest
        assert talk.read[0] <= longest + 2
    assert talk.session.last["context"] > 20 * longest / 2


@pytest.mark.parametrize("penalty", [1.5, None], ids=["penalty", "no penalty"])
@pytest.mark.parametrize("template", [TEMPLATE, TRIMMED, None], ids=["template", "trimmed", "no template"])
def test_the_state_is_that_of_the_talk(
    folder: Path, template: str | None, penalty: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same answers as from a new cache that reads all that the talk's has read; generate() is given no more than it needs."""
    talk, given = Watched(folder, monkeypatch, template), list[int]()
    talk.model.generation_config.repetition_penalty = penalty  # of all that was said
    generate = talk.model.generate
    monkeypatch.setattr(talk.model, "generate", lambda ids, **more: (given.append(ids.shape[1]), generate(ids, **more))[1])
    for words in WORDS:
        said = talk.asked(words)
        unread = talk.session.last["prefill_tokens"]
        whole = talk.session.last["context"] - GREEDY.max_tokens
        assert given[-1] == (whole if penalty else unread)
        assert unread < whole or words == WORDS[0]
        assert said.endswith(f"\nUser: {words}\nAssistant:" if template is None and words != WORDS[0] else asking(words, template))
        if template is TRIMMED and words != WORDS[0]:
            assert f"assistant\n{talk.session.history[-3]['content'].strip()[:3]}<|end|>\n<|start|>user" in said


def asking(words: str, template: str | None) -> str:
    """How a template ends on a question."""
    if template is None:
        return f"User: {words}\nAssistant:"
    return f"<|start|>user\n{words if template is TEMPLATE else words[:3]}<|end|>\n<|start|>assistant\n"


def test_a_past_that_is_written_anew_costs_one_turn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Watched(folder, monkeypatch, TRIMMED)
    for turn in range(6 * SNAPSHOTS):
        talk.ask(WORDS[turn % len(WORDS)])
        assert sum(talk.read) < 80, "a turn and the one before it"
    assert talk.session.last["context"] > 4 * 80


def test_undo_is_as_if_nothing_had_been_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Watched(folder, monkeypatch, TEMPLATE)
    talk.ask(WORDS[0])
    second = talk.ask(WORDS[1])
    talk.ask(WORDS[2])
    talk.session.undo()
    talk.session.undo()
    assert len(talk.session.history) == 2
    assert talk.ask(WORDS[1]) == second
    assert len(talk.read) == 1
    for _ in range(3):
        talk.session.undo()
    assert talk.session.history == []
    assert talk.ask(WORDS[0])


def test_an_answer_that_breaks_off_leaves_a_talk_that_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Watched(folder, monkeypatch, TEMPLATE)
    talk.ask(WORDS[0])
    pieces = talk.session.ask(WORDS[1], Settings(max_tokens=200))
    begun = next(pieces)
    pieces.close()
    assert talk.session.history[-1] == {"role": "assistant", "content": begun}
    said = talk.asked(WORDS[2])
    assert said.endswith(f"{asking(WORDS[1], TEMPLATE)}{begun}<|end|>\n{asking(WORDS[2], TEMPLATE)}")
    assert said.count(WORDS[1]) == 1


def test_what_ends_an_answer_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the template writes it, not again as the model did."""
    talk = Watched(folder, monkeypatch, TEMPLATE)
    talk.model.generation_config.forced_eos_token_id = talk.tokenizer.eos_token_id
    talk.ask(WORDS[0])
    talk.ask(WORDS[1])
    said = talk.tokenizer.decode(talk.known[-GREEDY.max_tokens])
    assert said.endswith(f"<|end|>\n{asking(WORDS[1], TEMPLATE)}")
    assert "<|end|><|end|>" not in said


def test_all_answers_come_from_one_thread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads made anew spread what a talk allocates over all of malloc's arenas."""
    talk, seen = Watched(folder, monkeypatch, TEMPLATE), set[threading.Thread]()
    talk.model.get_input_embeddings().register_forward_pre_hook(lambda *_: seen.add(threading.current_thread()))
    for words in WORDS:
        talk.ask(words)
    assert len(seen) == 1


THREADS = """
import os
import time
import torch
from linearize.devices import let_threads_go

def busy():
    time.sleep(0.2)  # a thread that ends is there for a moment
    return len(os.listdir("/proc/self/task"))

alone = busy()
torch.ones(1 << 22).exp_()
shared = busy()
assert let_threads_go()
print(alone, shared, busy(), torch.get_num_threads(), float(torch.ones(1 << 22).exp_().sum()) > 0, busy())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="which threads there are is read from /proc")
def test_threads_that_compute_no_more_slow_no_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP's of the calling thread end before an answer begins, and come again when they are asked for; those of the answering
    one end with it."""
    if "libgomp" in Path("/proc/self/maps").read_text():  # GNU's
        assert let_threads_go()
        two = {**os.environ, "OMP_NUM_THREADS": "2"}
        told = subprocess.run([sys.executable, "-c", THREADS], env=two, capture_output=True, text=True, check=False)
        assert not told.returncode, told.stderr
        alone, shared, after, count, works, again = told.stdout.split()
        assert int(alone) == int(after) < int(shared)
        assert (count, works, again) == ("2", "True", shared)
    calls: list[bool] = []
    monkeypatch.setattr(generate, "let_threads_go", lambda: calls.append(threading.current_thread() is threading.main_thread()))
    Watched(folder, monkeypatch, TEMPLATE).ask(WORDS[0])
    assert calls == [True, False]


def test_what_is_kept_does_not_grow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Watched(folder, monkeypatch, TEMPLATE)
    for words in WORDS * 3:
        talk.ask(words)
    for heard in (talk.session._heard, *talk.session._snapshots):
        assert len(heard.pending) <= 1
        assert not any(isinstance(x, str) for x in vars(heard).values())
    assert len(talk.session._snapshots) == SNAPSHOTS


def test_a_long_talk_tells_how_far_it_is(folder: Path) -> None:
    told: list[tuple[int, int]] = []
    found = probe("talk", folder, lambda *so_far: told.append(so_far), tokens=[20, 90], turn=8, dtype="auto", device="cpu")
    assert [total for _, total in told] == [90] * len(told)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1] == (90, 90)
    assert len(told) == found["peaks"][-1]["turns"] > found["peaks"][0]["turns"]


def test_a_long_prompt_is_read_in_chunks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However they fall, on a new cache and on one that has read some of it: the same answer."""
    generator = open_generator(folder)
    ids, settings, found = torch.arange(3, 64), Settings(max_tokens=12), []
    for chunk in (2048, 8, 20, 60, 61):
        monkeypatch.setattr("linearize.serving.generate.PREFILL_CHUNK", chunk)
        for known in (0, 5):
            cache = generator.new_cache()
            generator.read(ids[:known], cache)
            list(generator.stream(ids, cache, settings))
            assert cache.get_seq_length() == len(generator.sequence) - 1
            found.append(generator.sequence.tolist())
    assert all(one == found[0] for one in found)
