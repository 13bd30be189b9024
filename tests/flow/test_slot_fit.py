"""The learnt slot score: what it is fitted to, that the fit is the least squares one, and that a conversion makes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from cli.tiny import TEXT, write_model
from transformers import AutoTokenizer

from linearize.conversion.calibration import start_mixer
from linearize.conversion.calibration_text import CalibrationText, calibration_ids
from linearize.conversion.convert import convert
from linearize.conversion.plan import make_plan
from linearize.conversion.streaming import (
    CALIBRATION_ROWS,
    FEWEST_ROWS,
    MOST_ROWS,
    SCORE_LENGTH,
    SCORE_ROWS,
    asking,
    calibration_shape,
)
from linearize.errors import InputError, UsageError
from linearize.loading import load
from linearize.methods import calibration as calibrations
from linearize.methods.calibration import Calibration
from linearize.methods.default import Default
from linearize.methods.slot_fit import FADE_TOKENS, LEAST, RIDGE, ScoreFit, attention_inside_and_beyond, set_rates
from linearize.modeling.memory import empty_state
from linearize.modeling.slot_scores import log_attention
from linearize.modeling.spec import SLOT_TARGETS, MixerSpec
from linearize.modeling.window import visible
from linearize.testing.models import random_inputs, random_mixer, tiny_shape

SPEC = MixerSpec(merge="near", feature_map="identity", share_kv=True, window=4, sinks=2, slots=3, slot_score="learned")
TIME = 40


def calibration(rows: int = 3) -> Calibration:
    inputs = random_inputs(tiny_shape(), TIME, rows)
    return Calibration(inputs, torch.zeros(rows, TIME, 4, 8, dtype=torch.float64))


def by_loops(given: Calibration, spec: MixerSpec, row: int, head: int, token: int) -> tuple[float, float]:
    """Of one token: the most attention that a query of its kv head gives it inside the window, and beyond (or its mean square)."""
    q, k = given.inputs.q[row], given.inputs.k[row]
    inside, beyond = 0.0, [0.0]
    for reader in (2 * head, 2 * head + 1):
        for t in range(token, TIME):
            scores = given.inputs.score(q[reader, t : t + 1], k[head, : t + 1])[0].exp()
            seen = visible(spec, torch.tensor([t]), torch.arange(t + 1)) | (torch.arange(t + 1) < spec.sinks)
            if not seen[token]:
                beyond.append(float(scores[token] / scores.sum()))
            elif t - token > spec.window // 8:
                inside = max(inside, float(scores[token] / scores[seen].sum()))
    mean = sum(x**2 for x in beyond) / max(len(beyond) - 1, 1)
    return inside, mean**0.5 if spec.slot_target == "mean_square" else max(beyond)


@pytest.mark.parametrize("target", SLOT_TARGETS)
@pytest.mark.parametrize("kind", ["sliding", "terraced"])
@pytest.mark.parametrize("block", [7, 256])
def test_attention_inside_and_beyond_the_window(block: int, kind: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrations, "ROW_BLOCK", block)
    given, spec = calibration(), replace(SPEC, window_kind=kind, slot_target=target)
    inside, beyond = attention_inside_and_beyond(spec, 2, given)
    for row, head, token in ((0, 0, 5), (1, 1, 17), (2, 0, 30), (2, 1, TIME - 1), (0, 1, 8)):
        expected = by_loops(given, spec, row, head, token)
        assert (float(inside[row, head, token]), float(beyond[row, head, token])) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("fade, aim", [(0.0, "largest"), (0.75, "largest"), (0.75, "mean_square")])
def test_the_fit_is_the_least_squares_one(fade: float, aim: str) -> None:
    spec = replace(SPEC, slot_fade=fade, slot_target=aim, more_slots=2, more_heads=(1,))
    mixer, given, fit = random_mixer(spec, dtype=torch.float32), calibration(), ScoreFit(spec, tiny_shape())
    for row in range(3):  # in parts it is the fit of all
        fit.add(given.part(slice(row, row + 1)))
    mixer.slot_score = fit.solved()
    set_rates(mixer)
    got, wanted = attention_inside_and_beyond(spec, 2, given)
    counted = slice(SPEC.sinks, TIME - 2 * SPEC.window)
    assert given.inputs.hidden is not None
    hidden = given.inputs.hidden[:, counted].flatten(0, 1).double()
    for head in range(2):
        own = log_attention(got[:, head, counted].flatten()).double()
        columns = torch.cat([hidden, torch.ones_like(hidden[:, :1]), own], 1)
        target = wanted[:, head, counted].flatten()[:, None].clamp(min=LEAST[aim]).log().double()
        size = (RIDGE * columns.square().sum(0).mean()).sqrt() * torch.eye(columns.shape[1], dtype=columns.dtype)
        left, right = torch.cat([columns, size]), torch.cat([target, target.new_zeros(len(size), 1)])
        least = torch.linalg.lstsq(left, right).solution
        learned: Any = mixer.slot_score
        fitted = torch.cat([learned.up[head], learned.bias[head : head + 1], learned.attention[head]]).double()
        assert torch.allclose(fitted, least[:, 0], atol=1e-3)
        assert float(learned.rate[head].detach()) == pytest.approx(fade / FADE_TOKENS)


def test_rows_that_are_too_short_leave_the_attention_that_a_token_got() -> None:
    inputs, fit = random_inputs(tiny_shape(), 8, 1, torch.float32), ScoreFit(SPEC, tiny_shape())
    fit.add(Calibration(inputs, torch.zeros(1, 8, 4, 8)))
    learned = fit.solved()
    assert not learned.up.any()
    assert learned.attention.tolist() == [[1.0, 0.0]] * 2


def test_a_conversion_fits_it_on_rows_of_its_own(tmp_path: Path) -> None:
    source = write_model(tmp_path / "tiny")
    (tmp_path / "book.txt").write_text(TEXT, encoding="utf-8")
    options = {"window": 4, "sinks": 2, "slots": 8, "slot_score": "learned", "kv_dtype": "int8"}
    plan = make_plan(str(source), options=options)
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = calibration_ids(tokenizer, CalibrationText(tmp_path / "book.txt"), plan)
    assert CALIBRATION_ROWS < len(ids) <= CALIBRATION_ROWS + MOST_ROWS
    first = ids[len(ids) - asking(len(ids))]  # of those that ask for something: it stands near the beginning
    key = str(tokenizer.decode(first))
    answer = key.rsplit(" ", 1)[1].rstrip(".")
    assert key.index(answer) < len(key) / 4
    convert(str(source), options=options, calibration=tmp_path / "book.txt", output=tmp_path / "out")
    model, _ = load(tmp_path / "out")
    for layer in model.model.layers:
        assert layer.self_attn.linearize.slot_score.up.abs().sum() > 0
    assert plan.mixers == {replace(layer.self_attn.linearize.spec) for layer in model.model.layers}


def test_parts_share_what_all_rows_share() -> None:
    given = calibration()
    assert given.inputs.cos is not None
    alike = replace(given, inputs=replace(given.inputs, cos=given.inputs.cos[:1]))
    last = alike.part(slice(2, None))
    assert torch.equal(last.inputs.q, given.inputs.q[2:])
    assert last.inputs.cos is not None
    assert torch.equal(last.inputs.cos, given.inputs.cos[:1])


def test_what_the_teacher_does_is_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, apart = calibration(), calibration()
    log_mass, distance = whole.log_mass(), whole.mean_distance()
    monkeypatch.setattr(calibrations, "ROW_BLOCK", 7)
    assert torch.allclose(apart.log_mass(), log_mass)
    assert torch.allclose(apart.mean_distance(), distance)
    head = 3
    q, k = apart.inputs.q[:, head], apart.inputs.k[:, head // 2]
    seen = torch.ones(TIME, TIME).tril() > 0
    scores = apart.inputs.score(q, k).masked_fill(~seen, -torch.inf)
    away = torch.arange(TIME)[:, None] - torch.arange(TIME)
    assert torch.allclose(log_mass[:, head], scores.logsumexp(-1))
    assert torch.allclose(distance[head].double(), (scores.softmax(-1) * away).sum(-1).mean())


class Seen(Default):
    """Keeps what its memory was started on."""

    rows: ClassVar[list[Calibration]] = []

    def initialise(self, mixer: Any, calibration: Calibration) -> None:
        self.rows.append(calibration)


def test_memories_behind_learnt_slots_start_from_whole_rows() -> None:
    """Elsewhere from the first two rows, up to 1,024 tokens of each; a score that is there is not fitted, but fades as told."""
    long = Calibration(random_inputs(tiny_shape(), 1100, 4, torch.float32), torch.zeros(4, 1100, 4, 8))
    far = replace(Default().mixer(), window=4, sinks=2)
    slotted = random_mixer(replace(far, slots=3, slot_score="learned"), dtype=torch.float32)
    assert slotted.slot_score is not None
    known = {name: torch.full_like(x, 0.5) for name, x in slotted.slot_score.state_dict().items()}
    for mixer, score, shape in ((slotted, None, (3, 1100)), (slotted, known, (3, 1100)), (random_mixer(far), None, (2, 1024))):
        used = start_mixer(mixer, Seen(), long, score)
        assert used.target.shape[:2] == Seen.rows[-1].target.shape[:2] == shape
    rate = slotted.spec.slot_fade / FADE_TOKENS
    assert all(bool((x == (0.5 if name != "rate" else rate)).all()) for name, x in slotted.slot_score.state_dict().items())


@pytest.mark.parametrize("documents", [[100], [1000] * 40, [2048] * 9, [5000] * 8, [9000] * 2, [20_000]])
def test_rows_are_as_long_as_the_text_has_enough_of_them(documents: list[int]) -> None:
    plain = MixerSpec(merge="near", feature_map="identity", share_kv=True, window=4, sinks=2)
    assert calibration_shape({plain}, documents) == (CALIBRATION_ROWS, min(1024, max(documents)))
    count, length = calibration_shape({SPEC, plain}, documents)
    assert count - asking(count) == CALIBRATION_ROWS + asking(count)
    assert count * length <= SCORE_ROWS * SCORE_LENGTH + CALIBRATION_ROWS * length
    there = sum(size // length for size in documents)
    assert there >= count - asking(count) or length <= 1024
    longer = 2 * length
    if longer in (SCORE_LENGTH, SCORE_LENGTH // 2):
        assert sum(size // longer for size in documents) < CALIBRATION_ROWS + FEWEST_ROWS * SCORE_LENGTH // longer // 2


def test_rows_of_a_length_that_is_wanted() -> None:
    """Or an error: neither shorter ones nor rows of several documents."""
    for length, documents, most in ((8192, [9000] * 40, 14), (8192, [9000] * 4, 6), (512, [9000] * 40, 2 + MOST_ROWS)):
        assert calibration_shape({SPEC}, documents, length) == (most, length)
    with pytest.raises(ValueError, match="3 rows of 8,192 tokens lie inside one document, and at least 4 are needed"):
        calibration_shape({SPEC}, [9000] * 3, 8192)


def test_a_conversion_on_rows_of_a_length_that_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, book = write_model(tmp_path / "tiny"), tmp_path / "book.txt"
    book.write_text(4 * TEXT, encoding="utf-8")
    seen: list[int] = []
    add = ScoreFit.add
    monkeypatch.setattr(ScoreFit, "add", lambda self, given: (seen.append(given.target.shape[1]), add(self, given))[1])
    options = {"window": 4, "sinks": 2, "slots": 8, "slot_score": "learned"}
    convert(str(source), options=options, calibration=book, calibration_length=256, output=tmp_path / "out")
    assert set(seen) == {256}
    with pytest.raises(InputError, match="0 rows of 100,000 tokens") as found:
        convert(str(source), options=options, calibration=book, calibration_length=100_000, output=tmp_path / "other")
    assert str(book) in found.value.where
    with pytest.raises(UsageError, match="no layer has slots that go by a learnt score"):
        convert(str(source), calibration=book, calibration_length=256, output=tmp_path / "other")
    with pytest.raises(UsageError, match="no room for what is asked"):
        convert(str(source), options=options, calibration=book, calibration_length=255, output=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_rate_forgets_what_is_old() -> None:
    """It adds rate times position to the score: a high one keeps the last tokens that left, a low one the first."""
    mixer, inputs = random_mixer(SPEC, dtype=torch.float32), random_inputs(tiny_shape(), TIME, 1, torch.float32)
    learned: Any = mixer.slot_score
    assert inputs.hidden is not None
    position = torch.arange(TIME)[None]
    learned.rate.data.zero_()
    plain = learned.arrived(inputs.hidden, position)
    learned.rate.data.copy_(torch.tensor([0.5, 2.0]))
    gained = learned.arrived(inputs.hidden, position) - plain
    assert torch.allclose(gained[0, :, :, 0], learned.rate[:, None] * position, atol=1e-4)
    left = range(SPEC.sinks, TIME - SPEC.window)
    for rate, expected in ((-100.0, left[: SPEC.slots]), (100.0, left[-SPEC.slots :])):
        learned.rate.data.fill_(rate)
        _, state = mixer(inputs, empty_state(SPEC, tiny_shape(), 1, torch.float32, torch.device("cpu")), keep=True)
        assert state is not None
        slots = state["slot_k"]
        assert torch.equal(slots, inputs.k[:, :, list(expected)])
