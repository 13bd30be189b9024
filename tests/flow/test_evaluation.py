"""Perplexity by position, its intervals, and every row of the table, against a forward pass of the whole text."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from linearize.evaluation.fidelity import curve, evaluate_model, tabulate, variants_of, window_alone
from linearize.evaluation.intervals import draws, wilson
from linearize.evaluation.layers import far_share, layer_errors
from linearize.evaluation.perplexity import Variant, compare
from linearize.evaluation.reading import Reader
from linearize.evaluation.samples import repetition
from linearize.evaluation.speed import crossover
from linearize.evaluation.texts import Texts, read_texts
from linearize.modeling.mixer import Mixer
from linearize.modeling.modeling_linearized import attentions, mode, replaced
from linearize.modeling.spec import MixerSpec
from linearize.modeling.stream import Halves
from linearize.testing.laws import run
from linearize.testing.models import linearized, random_inputs, random_mixer, tiny_llama
from linearize.text import Packed

SPEC = MixerSpec(feature_map="hedgehog", window=8, sinks=2, slots=4, far_mass="query", share_kv=True)


@pytest.fixture(scope="module")
def model() -> Any:
    made = linearized(tiny_llama(max_position_embeddings=4096), SPEC)
    made.config.linearize["method"] = "none"
    return made


def text_of(*lengths: int) -> Texts:
    rows = [torch.randint(3, 64, (1, n), generator=torch.Generator().manual_seed(n)) for n in lengths]
    return Texts([Packed(ids, torch.arange(ids.shape[1])[None]) for ids in rows], list(range(len(rows))))


def whole(variant: Variant, row: Packed) -> Tensor:
    with torch.no_grad(), variant.context():
        return variant.model(input_ids=row.ids, use_cache=False).logits[0].double().log_softmax(-1)


def test_every_row_is_what_a_whole_forward_pass_gives(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks on a cache of its own for each variant, and sums by position, change nothing: loss, KL and agreement by bucket."""
    monkeypatch.setattr("linearize.evaluation.perplexity.CHUNK", 100)
    texts, variants = text_of(1300, 300), variants_of(model, model)
    sums = compare(variants, texts.rows, lambda done, total: None)
    names = [v.name for v in variants]
    parts = [f"student, {what} off" for what in ("far memory", "window", "slots")]
    assert names[:5] == ["teacher", "student", *parts]
    assert [name.endswith("alone") for name in names[5:]] == [True, True]
    table, positions = tabulate(variants, sums, texts, True, 0)
    assert [(b["from"], b["to"], b["documents"]) for b in positions[0]["buckets"]] == [(0, 1024, 2), (1024, 2048, 1)]
    for variant, row, by_position in zip(variants, table, positions, strict=True):
        given = [(whole(variant, text), whole(variants[0], text), text.ids[0, 1:]) for text in texts.rows]
        for bucket, (start, stop) in zip(by_position["buckets"], ((1, 1024), (1024, 2048)), strict=True):
            loss = torch.cat([-own[:-1].gather(1, ids[:, None])[start - 1 : stop - 1, 0] for own, _, ids in given])
            kl = torch.cat([(t.exp() * (t - own)).sum(-1)[:-1][start - 1 : stop - 1] for own, t, _ in given])
            top = torch.cat([(own.argmax(-1) == t.argmax(-1))[:-1][start - 1 : stop - 1] for own, t, _ in given])
            assert bucket["tokens"] == len(loss)
            assert math.log(bucket["perplexity"]) == pytest.approx(float(loss.mean()), rel=1e-5)
            assert bucket["kl"] == pytest.approx(float(kl.mean()), abs=1e-6)
            assert bucket["top1"] == pytest.approx(float(top.double().mean()), abs=2 / len(loss))
        assert row["perplexity_interval"][0] <= row["perplexity"] <= row["perplexity_interval"][1]
    assert len({round(row["perplexity"], 4) for row in table}) == len(table)  # no two rows measure the same
    assert curve(sums[1], 1300)[-1][0] == 1536


def test_the_last_row_has_the_state_bytes_of_the_student(model: Any) -> None:
    """As large a window as fits: one token more would cost more than the student's whole state."""
    variants = variants_of(model, model)
    student, bare = variants[1], variants[-1]
    assert student.state_bytes is not None
    assert bare.state_bytes is not None
    shape = attentions(model)[0].linearize.shape
    window = int(bare.name.split()[1])
    assert bare.state_bytes <= student.state_bytes < 2 * window_alone(SPEC, window + 1).state_bytes(shape)
    with replaced(model, window_alone(SPEC, window)):  # and its cache holds that much
        reader = Reader(Variant("", model))
        reader(torch.ones(1, 300, dtype=torch.long), keep=1)
    assert reader.nbytes() == pytest.approx(bare.state_bytes, abs=64)


def test_intervals_draw_documents_not_rows() -> None:
    """Ten rows of one document are one trial: no spread; of ten documents, that of their means."""
    value = torch.arange(10.0, dtype=torch.float64)
    alone, apart = draws([0] * 10), draws(list(range(10)))
    assert ((alone @ value) / alone.sum(1)).std() < 1e-9
    means = (apart @ value) / apart.sum(1)
    assert float(means.std()) == pytest.approx(float(value.std(correction=0)) / 10**0.5, rel=0.1)
    assert torch.equal(draws([4, 4, 2], 1), draws([4, 4, 2], 1))


def test_a_few_perfect_answers_are_no_certainty() -> None:
    assert wilson(1.0, 4) == pytest.approx((0.5101, 1.0), abs=1e-4)  # as published tables have it
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


class Letters:
    """A token for each letter."""

    eos_token_id = None

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 60 + 3 for letter in text]}


def test_texts_lie_inside_documents_and_reach_as_far_as_asked() -> None:
    docs = ["a" * 5000, "b" * 3000, "c" * 500, "d" * 800, "e" * 2000]
    texts = read_texts(Letters(), docs, 9000, 4096)
    assert texts.longest == 4096
    assert sum(row.ids.shape[1] for row in texts.rows) <= 9000
    for row, document in zip(texts.rows, texts.documents, strict=True):
        assert set(row.ids[0].tolist()) == {ord("abcde"[document]) % 60 + 3}
    assert set(texts.documents) == set(range(5))
    assert [last for _, last in texts.buckets()] == [1024, 2048, 4096]


def test_repetition() -> None:
    assert repetition([1, 2, 3, 4, 5, 6]) == 0
    assert repetition([1, 2, 3, 4] * 2) == pytest.approx(1 / 5)
    assert repetition([7] * 23) == pytest.approx(19 / 20)


def test_a_crossing_lies_between_the_lengths_that_enclose_it() -> None:
    lengths = (512, 1024, 2048)
    assert crossover(lengths, [8, 8, 8], [4, 8, 16]) == pytest.approx(1024)
    assert crossover(lengths, [8, 8, 8], [2, 4, 16]) == pytest.approx(1024 * 2**0.5)
    assert crossover(lengths, [8, 8, 8], [1, 2, 4]) is None
    assert crossover(lengths, [1, 1, 1], [2, 2, 2]) == 512


@pytest.mark.parametrize("changes", [{}, {"merge": "sum", "near_weight": 0.25, "far_mass": "none"}])
def test_the_far_share_is_what_the_far_half_weighs(changes: dict[str, object]) -> None:
    """Values of near all 0 and of far all 1 would give the share itself: read off the mixer's output here."""
    spec = MixerSpec(**{"feature_map": "elu1", "window": 4, "sinks": 1, "far_mass": "query", **changes})
    mixer = random_mixer(spec)
    inputs = random_inputs(mixer.shape, 40)
    halves = mixer.halves(inputs)
    share = far_share(mixer, halves)
    assert share is not None
    near, far, both = (ablated_output(mixer, halves, half) for half in ("far", "near", None))
    if "merge" in changes:
        assert torch.allclose(share, torch.full_like(share, 0.75))
    else:
        assert torch.allclose(both, (1 - share)[..., None] * near + share[..., None] * far, atol=1e-9)


def ablated_output(mixer: Mixer, halves: Halves, half: str | None) -> Tensor:
    mixer.ablate = half
    return mixer.combine(halves)


@pytest.mark.parametrize("more", [{}, {"more_slots": 3, "more_heads": (0,)}])
def test_without_slots_the_rest_stays_as_it_was(more: dict[str, Any]) -> None:
    """Nobody looks at what they hold, which moves on as before: the bare window alone, the memory with what they give up."""
    for spec in (SPEC, MixerSpec(feature_map="identity", window=8, sinks=2, slots=4, merge="near", share_kv=True)):
        mixer = random_mixer(replace(spec, **more))
        inputs = random_inputs(mixer.shape, 60)
        state = run(mixer, inputs, [60])[1]
        mixer.ablate = "slots"
        found, after = run(mixer, inputs, [60])
        stepped = run(mixer, inputs, [40] + [1] * 20)[0]
        assert torch.allclose(found, stepped, atol=1e-9)
        assert all(torch.equal(after[name], x) for name, x in state.items())
        if not spec.has_far:
            bare = random_mixer(replace(spec, slots=0))
            assert torch.allclose(found, run(bare, inputs, [60])[0], atol=1e-9)


def test_layers_are_told_apart(model: Any) -> None:
    """A layer whose mixer is exact has no error; what the next layers make of the first one's is in the stream."""
    row = text_of(64).rows[0]
    exact = linearized(tiny_llama(), MixerSpec(window=64, sinks=1, merge="near", feature_map="identity", share_kv=True))
    errors = layer_errors(exact, exact, lambda: mode(exact, "teacher"), row)
    assert [layer["relative_error"] for layer in errors] == pytest.approx([0, 0], abs=1e-9)
    assert max(max(layer["stream"]) for layer in errors) < 1e-9
    found = layer_errors(model, model, lambda: mode(model, "teacher"), row)
    assert [layer["index"] for layer in found] == [0, 1]
    assert all(layer["relative_error"] > 1e-3 and len(layer["heads"]) == 4 and 0 < layer["far_share"] < 1 for layer in found)
    assert found[1]["stream"][0] < found[1]["stream"][-1]  # the first tokens still lie in window and sinks


def test_an_evaluation_without_a_teacher(model: Any) -> None:
    found = evaluate_model(model, None, None, text_of(300), "m", "t")
    assert found.rows[0]["name"] == "student"
    assert all(row["ratio"] is None and row["kl"] is None and row["perplexity"] for row in found.rows)
    assert "1 documents only" in found.notes[0]
