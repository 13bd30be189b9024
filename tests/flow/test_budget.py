"""The state budget: the frontier is the best there is, costs predict what a swap does, and a conversion takes what it found."""

from __future__ import annotations

import json
import weakref
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from cli.tiny import TEXT, Cli, write_model

from linearize.conversion import budget as layouts
from linearize.conversion import budget_costs, calibration, convert
from linearize.conversion.blocks import blocks
from linearize.conversion.budget import PLAIN, STORED, Choice, Frontier, Layout, Options, candidates, without_memory
from linearize.conversion.budget_costs import (
    ASKED_TOKENS,
    Rows,
    Weighed,
    choices,
    cost,
    gaining,
    log_odds,
    measure_costs,
    moved,
    output_gradients,
    plans_of,
    started,
)
from linearize.conversion.calibration import fit_scores
from linearize.conversion.convert import attach
from linearize.conversion.plan import Plan, plan_for
from linearize.conversion.ranking import alone
from linearize.conversion.sources import Source
from linearize.conversion.streaming import CALIBRATION_ROWS, MOST_ROWS, asking
from linearize.errors import InputError
from linearize.loading import load
from linearize.methods.calibration import Calibration
from linearize.methods.layout import check_options, layout
from linearize.modeling.attention import LinearizedAttention
from linearize.modeling.mixer import Mixer
from linearize.modeling.modeling_linearized import attentions, mode, observed
from linearize.modeling.spec import MixerSpec
from linearize.modeling.stream import Inputs
from linearize.progress import silent
from linearize.ranges import listed
from linearize.testing.families import tiny_family


def random_choices(seed: int, layers: int = 3, each: int = 5) -> list[Choice]:
    draw = Random(seed)
    return [
        Choice(layer, "window", {"window": 8 + i}, draw.randint(1, 40), draw.random(), draw.random())
        for layer, i in product(range(layers), range(each))
    ]


@pytest.mark.parametrize("seed", range(20))
def test_no_layout_of_as_few_bytes_is_better_than_one_on_the_frontier(seed: int) -> None:
    choices = random_choices(seed)
    frontier = Frontier(choices)
    every = [Layout(found) for found in product(*(frontier.layers[layer] for layer in sorted(frontier.layers)))]
    sizes = [x.bytes for x in frontier.layouts]
    assert sizes == sorted(set(sizes))
    for found in frontier.layouts:
        best = min(frontier.cost(x) for x in every if x.bytes <= found.bytes)
        assert frontier.cost(found) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(20))
def test_a_budget_is_kept_and_what_is_left_is_spent(seed: int) -> None:
    frontier = Frontier(random_choices(seed))
    for budget in range(frontier.layouts[0].bytes, frontier.layouts[-1].bytes + 20, 7):
        found = frontier.within(budget)
        assert found.bytes <= budget
        on = max((x for x in frontier.layouts if x.bytes <= budget), key=lambda x: x.bytes)
        assert frontier.cost(found) <= frontier.cost(on) + 1e-12
        for choice in (c for own in frontier.layers.values() for c in own):
            other = found.with_choice(choice)
            assert other.bytes > budget or other.bytes <= found.bytes or frontier.cost(other) >= frontier.cost(found)
    with pytest.raises(InputError, match="bytes are too few"):
        frontier.within(frontier.layouts[0].bytes - 1)


@pytest.fixture
def few_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of slots for a tiny model would be nothing but slow."""
    monkeypatch.setattr(layouts, "slot_counts", lambda length: [8, 16, 32])
    monkeypatch.setattr(layouts, "LASTING", 16)


@pytest.mark.parametrize("seed", range(20))
def test_a_layout_is_told_as_flags_that_give_it_back(seed: int) -> None:
    draw = Random(seed)
    picked = [draw.choice(candidates()) for _ in range(12)]
    further = {**candidates()[-1][1], "more_slots": 300, "more_heads": "0,2-3"}
    picked[3:6] = [("default", further), ("default", {**further, "more_heads": "1"}), picked[3]]
    made = Layout(tuple(Choice(i, name, options, 1, 0.0, 0.0) for i, (name, options) in enumerate(picked)))
    check_options(made.method, made.options)
    for i, (name, options) in enumerate(picked):
        place = layout(made.method, made.options, layer=i)[i]
        assert place is not None
        assert place.name == name
        for key, value in options.items():
            assert getattr(place.mixer, key) == (value if key != "more_heads" else tuple(listed(value)))


def searched(length: int, rows: int = 12) -> tuple[Plan, Any, Rows]:
    """A tiny model as the search sees it, in fp64, and random rows of so many tokens."""
    base = tiny_family("llama").double()
    torch.manual_seed(0)
    ids = torch.randint(base.config.vocab_size, (rows, length))
    source = Source("tiny", "tiny", "memory", None, base.config.to_dict())
    plan = plan_for(source, "default", None, {**PLAIN, **STORED, "slots": 64}, "calibrated")
    return plan, attach(base.eval(), plan.config_field()), Rows.of(ids)


@pytest.mark.usefixtures("few_slots")
def test_costs_tell_what_a_swap_does() -> None:
    """KL of single swaps by the second-order form against the real one, where a window sees all and what changes is 8 bits."""
    plan, model, rows = searched(96, CALIBRATION_ROWS + MOST_ROWS)
    scores = fit_scores(model, rows.ids[rows.fitted], model.device, silent)
    found = measure_costs(model, plan, rows, scores, 0, lambda *_, **__: None)
    alike = [c for c in found if "more_slots" not in c.options]
    assert len(alike) == len(candidates()) * len(plan.parts)
    told = {(c.layer, c.options["window"]): c.kl for c in found if c.method == "window" and not c.options["slots"]}
    text = rows.ids[rows.measured][rows.asked :]
    with torch.no_grad():
        with mode(model, "observe"):
            teacher = model(text).logits[:, :-1].log_softmax(-1)
        for attention, window in product(attentions(model), (256,)):
            options = next(own for name, own in candidates() if own["window"] == window)
            place = plan_for(plan.source, "window", None, options, "calibrated").parts[attention.linearize_index]
            attention.linearize = Mixer(place.mixer, plan.shape)
            with alone(model, attention):
                student = model(text).logits[:, :-1].log_softmax(-1)
            real = float((teacher.exp() * (teacher - student)).sum(-1).mean())
            assert real / 2 < told[attention.linearize_index, window] < real * 2


def test_gradients_are_the_same_where_activations_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is afterwards as it was before, and no graph outlives its backward pass."""
    _, model, rows = searched(160)
    kept, hooked = [0], list[weakref.ref[torch.Tensor]]()
    hook = torch.Tensor.register_hook
    monkeypatch.setattr(torch.Tensor, "register_hook", lambda x, call: (hooked.append(weakref.ref(x)), hook(x, call))[1])

    def gradients() -> dict[int, torch.Tensor]:
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(kept.pop() + x.numel()), x)[1], lambda x: x):
            return output_gradients(model, rows, 0, silent)

    first, *rest = blocks(model)
    first.forward = replaced = first.forward
    own = gradients()
    assert len(hooked) >= len(own)
    assert not any(x() is not None for x in hooked)
    assert vars(first)["forward"] is replaced
    assert not any("forward" in vars(layer) for layer in rest)
    monkeypatch.setattr(budget_costs, "recomputing", nullcontext)
    other = gradients()
    assert kept[1] < kept[2] / 2
    for layer, gradient in own.items():
        assert torch.equal(gradient, other[layer])


def test_there_are_as_many_slots_as_three_quarters_of_a_row() -> None:
    for length, half in ((160, 2048), (4096, 2048), (8000, 4000), (8192, 4096), (32768, 16384)):
        slots = {own["slots"] for _, own in candidates(length)}
        assert sorted(slots) == [0, *(2**n for n in range(6, 15) if 2**n < half), half, half * 3 // 2]


def test_slots_are_weighed_by_the_scores_that_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others keep other tokens: what has slots costs something else, what has none the same."""
    plan, model, rows = searched(160)
    some = [("window", {"window": 16, "slots": 0, **STORED}), ("default", {**PLAIN, **STORED, "slots": 16})]
    monkeypatch.setattr(budget_costs, "candidates", lambda length: some)
    scores = fit_scores(model, rows.ids[rows.fitted], model.device, silent)
    one, other = (measure_costs(model, plan, rows, given, 0, silent) for given in (scores, {}))
    assert [c.options["slots"] for c in one] == [0, 16] * len(plan.parts)
    assert [own.kl != without.kl for own, without in zip(one, other, strict=True)] == [False, True] * len(plan.parts)


def test_slots_without_a_memory_are_weighed_by_what_a_memory_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As mixers of their own would be."""
    plan, model, rows = searched(160)
    slots = {**PLAIN, **STORED, "slots": 16}
    bare = ("window", without_memory(slots))
    scores = fit_scores(model, rows.ids[rows.fitted], model.device, silent)
    found = []
    for some in ([("default", slots), bare], [bare]):
        monkeypatch.setattr(budget_costs, "candidates", lambda length, some=some: some)
        found.append([c for c in measure_costs(model, plan, rows, scores, 0, silent) if c.method == "window"])
    for one, other in zip(*found, strict=True):
        assert (one.bytes, one.options) == (other.bytes, other.options)
        assert (one.kl, one.recall) == pytest.approx((other.kl, other.recall), rel=1e-9)
        assert one.kl > 0


def test_a_layer_whose_heads_differ_costs_what_its_mixer_does() -> None:
    """Whatever number of slots the other heads have: the choice's cost is that of the mixer with its options, on the same rows."""
    plan, model, rows = searched(160)
    gradients = output_gradients(model, rows, 0, silent)
    scores = fit_scores(model, rows.ids[rows.fitted], model.device, silent)
    pairs: list[tuple[Any, Any]] = []

    def observe(attention: LinearizedAttention, inputs: Inputs, target: torch.Tensor) -> None:
        if attention.linearize_index:
            return
        every = Calibration(inputs, target)

        def weighed(method: str, options: Options) -> Weighed:
            mixer = started(plans_of(plan, method, options)[0], plan, every.part(rows.fitted), scores[0], 0)
            own = every.part(rows.measured)
            off = moved(mixer.combine(mixer.halves(own.inputs)), own.target, gradients[0], plan.shape.kv_heads)
            return Weighed(method, options, mixer.spec, off)

        near = {"window": 16, "slot_score": "learned", "feature_dim": 8, **STORED}
        some = [{**near, "slots": slots, "slot_fade": fade} for fade in (40.0, 0.0) for slots in (8, 24)]
        found = [weighed("default", own) for own in some] + [weighed("window", without_memory(own)) for own in some]
        for choice in choices(0, found, plan.shape, rows):
            real = weighed(choice.method, choice.options)
            told = (choice.bytes, choice.kl, choice.recall)
            pairs.append((told, (real.mixer.state_bytes(plan.shape), *cost(real.moved.sum(2), rows))))

    with torch.no_grad(), observed(model, observe), mode(model, "observe"):
        model(rows.ids, logits_to_keep=1)
    assert len(pairs) > 4
    assert len({told for told, _ in pairs}) == len(pairs)
    for told, real in pairs:
        assert told == pytest.approx(real, rel=1e-6)


def test_heads_that_gain_most_come_first() -> None:
    """By KL and by recall, each number of them; rows are one that asks and one of text."""
    rows = Rows(torch.zeros(2, 4, dtype=torch.long), text=1, asked=1)
    few = torch.tensor([[[1.0, 5.0, 2.0]], [[3.0, 1.0, 2.0]]]).expand(-1, 4, -1)  # asked, text; by kv head
    spec = MixerSpec()
    found = gaining(Weighed("a", {}, spec, few), Weighed("b", {}, spec, torch.zeros_like(few)), rows)
    assert found == [(0,), (0, 2), (1,), (1, 2)]


def test_rows_that_ask_count_by_log_odds_at_their_end_and_text_by_log_p(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_family("llama")
    source = Source("tiny", "tiny", "memory", None, base.config.to_dict())
    plan = plan_for(source, "window", None, {"window": 64}, "calibrated")
    model = attach(base.eval(), plan.config_field())
    ids = torch.randint(base.config.vocab_size, (CALIBRATION_ROWS + MOST_ROWS, 32))
    rows, seen = Rows.of(ids), list[tuple[str, list[int]]]()
    for name in ("log_odds", "log_probability"):
        own = getattr(budget_costs, name)
        monkeypatch.setattr(
            budget_costs, name, lambda x, told, name=name, own=own: seen.append((name, told.tolist())) or own(x, told)
        )
    found = output_gradients(model, rows, 0, lambda *_, **__: None)
    assert [name for name, _ in seen] == ["log_odds"] * rows.asked + ["log_probability"] * rows.text
    asked = rows.ids[rows.measured][: rows.asked, -ASKED_TOKENS:]
    assert [told for _, told in seen[: rows.asked]] == asked.tolist()
    assert {len(told) for _, told in seen[rows.asked :]} == {31}
    assert all(len(x) == rows.asked + rows.text for x in found.values())


def test_rows_are_fitted_or_measured() -> None:
    for count, length, text, measured in ((6, 4096, 2, 2), (26, 4096, 2, 2), (10, 2048, 3, 4), (18, 1024, 5, 8)):
        ids = torch.arange(count)[:, None].expand(-1, length)
        rows = Rows.of(ids)
        asked = asking(count)
        assert sorted(rows.ids[:, 0].tolist()) == list(range(count))
        assert (rows.text, rows.asked) == (text, min(measured, asked))
        first = count - asked
        last = [*range(first, first + rows.asked), *range(first - text, first)]
        assert rows.ids[rows.measured][:, 0].tolist() == last
        assert sorted(rows.ids[rows.fitted][:, 0].tolist()) == [*range(count - asked - text), *range(count - asked, count)]


def test_log_odds_do_not_saturate() -> None:
    logits = torch.tensor([[30.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert torch.allclose(log_odds(logits, torch.tensor([0, 1])), torch.tensor([30.0, 0.0]) - torch.tensor(2.0).log())


@pytest.mark.usefixtures("few_slots")
def test_convert_finds_a_layout_and_says_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, cli = write_model(tmp_path / "tiny"), Cli(capsys)
    fitted = list[Any]()
    monkeypatch.setattr(convert, "fit_scores", lambda *given: fitted.append(fit_scores(*given)) or fitted[-1])
    monkeypatch.setattr(calibration, "fit_scores", lambda *given: pytest.fail("scores are fitted once"))
    (tmp_path / "book.txt").write_text(TEXT, encoding="utf-8")
    flags = ("--calibration", tmp_path / "book.txt", "-o", tmp_path / "out")
    done = cli("convert", source, "--state-budget", "12KB", *flags)
    assert done.code == 0, done.err
    assert "taken" in done.out
    config = json.loads((tmp_path / "out" / "config.json").read_text())["linearize"]
    assert f"--method '{config['method']}'" in " ".join(done.out.split())
    for own in (attention.linearize.slot_score for attention in attentions(load(tmp_path / "out")[0])):
        assert own is None or own.up.any()
        assert own is None or any(torch.equal(own.up, score["up"]) for score in fitted[0].values())
    again = cli("convert", source, "--state-budget", "12KB", *flags, "--overwrite", "--json")
    made = json.loads(again.out)
    assert made["plan"]["state_bytes"] <= 12_000
    assert made["plan"]["options"] == config["options"]
    assert made["plan"]["state_bytes"] in [layout["bytes"] for layout in made["frontier"]]
    assert cli("convert", source, "--state-budget", "1KB", *flags, "--overwrite").code == 3
    for more in (("--method", "hedgehog"), ("--set", "window=8"), ("--dry-run",)):
        assert cli("convert", source, "--state-budget", "12KB", *more, *flags, "--overwrite").code == 2
    assert cli("convert", source, "--state-budget", "much", *flags).code == 2
