"""What benchmarks make of their times, with a clock that the models move; and that what they time is what they say it is."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.tiny import environment
from flow.clock import CPU, MACHINE, Clock, clock_of, moves, tokens_of
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import StaticCache

from linearize.benchmarks import batch as batches
from linearize.benchmarks import decode as decoding
from linearize.benchmarks import llama_cpp
from linearize.benchmarks.batch import batch, copies, kv_bytes
from linearize.benchmarks.bounds import Counter, Machine, Work, bounded, counted, row, weight_bytes
from linearize.benchmarks.decode import decode, snapshots, static, stepper, students_of
from linearize.benchmarks.distill import KINDS, LENGTHS, bench_distill
from linearize.benchmarks.prefill import prefill
from linearize.benchmarks.probe import probe
from linearize.benchmarks.subject import Subject
from linearize.conversion.convert import convert_model
from linearize.conversion.teacher import unconverted
from linearize.devices import forget_peak, held_memory, peak_memory
from linearize.errors import ResourceError, UsageError
from linearize.evaluation.reading import Reader, Variant
from linearize.evaluation.speed import speed
from linearize.evaluation.timing import Spread, in_turn
from linearize.modeling.modeling_linearized import mode
from linearize.testing.families import DECODERS, tiny_family
from linearize.testing.models import tiny_llama

# ---- times ----


def test_a_spread_is_the_median_and_the_quartiles_around_it() -> None:
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0, 1)


def test_runs_are_timed_in_turn() -> None:
    clock, order = Clock(), list[str]()

    def run(name: str, seconds: float) -> Callable[[], None]:
        def move() -> None:
            order.append(name)
            clock.now += seconds * len(order)

        return move

    found = in_turn({"a": run("a", 1.0), "b": run("b", 10.0)}, 3, clock)
    assert order == ["a", "b"] * 3
    assert (found["a"], found["b"]) == (Spread(3.0, 2.0, 4.0, 3), Spread(40.0, 30.0, 50.0, 3))


def test_what_comes_before_a_run_is_off_the_clock() -> None:
    clock, order = Clock(), list[str]()

    def clear() -> None:
        order.append("clear")
        clock.now += 100.0

    assert in_turn({"a": lambda: order.append("a")}, 2, clock, before=clear)["a"].median == 0.0
    assert order == ["clear", "a"] * 2


def test_a_row_says_what_each_resource_alone_would_take() -> None:
    made = row("x", Spread.of([0.5]), Work(flops=1e8, calls=50_000, nbytes=2e8), tokens=100, length=7)
    found = bounded(made, MACHINE)
    assert found["bound"] == pytest.approx({"matmul": 0.2, "memory": 0.4, "calls": 0.1, "by": "memory"})
    assert (found["tokens_per_second"], found["length"]) == (200, 7)


def test_the_machine_counts_at_its_best() -> None:
    other = Machine("float32", threads=1, matmul=2e9, read=5e8, calls=1e6)
    assert MACHINE.best(other) == other.best(MACHINE) == Machine("float32", 1, 2e9, 1e9, 1e6)
    measured = Machine.measure(torch.float32, CPU)
    assert min(measured.matmul, measured.read, measured.calls) > 0


# ---- what is counted ----


def test_operations_are_counted_as_torch_counts_them() -> None:
    a, b = torch.randn(3, 5, 7), torch.randn(3, 7, 11, requires_grad=True)

    def run() -> None:
        (a @ b).relu().sum().backward()

    with FlopCounterMode(display=False) as counter:
        run()
    assert counted(run).flops == counter.get_total_flops() == 2 * 2 * 3 * 5 * 7 * 11
    with Counter() as calls:
        (a + a).neg()
    assert calls.calls == 2


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_softmax_attention_is_counted_with_its_backward_and_without_what_is_masked(kv_heads: int) -> None:
    """4 T S D a head, whether keys are shared or not; in a backward pass 10; half of them where it is causal."""
    time, width = 48, 8
    q = torch.randn(2, 4, time, width, requires_grad=True)
    k, v = torch.randn(2, 2, kv_heads, time, width)

    def run(causal: bool) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=kv_heads != 4)

    a_pass = 4 * 2 * 4 * time * time * width
    with torch.no_grad():
        assert counted(lambda: run(False)).flops == a_pass
        assert counted(lambda: run(True)).flops == a_pass / 2
    assert counted(lambda: run(True).sum().backward()).flops == a_pass / 2 * 3.5


@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_are_read_are_all_but_an_input_embedding_that_is_no_head(tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    table = 64 * 32 * 4
    assert weight_bytes(model) == 4 * sum(p.numel() for p in model.parameters()) - (0 if tied else table)


# ---- what is compared ----


@pytest.mark.parametrize("family", DECODERS)
def test_the_unconverted_model_is_the_stock_one_on_the_same_memory(family: str) -> None:
    base = tiny_family(family)
    ids = torch.randint(3, 97, (2, 70))
    with torch.no_grad():
        expected = base(ids).logits
    student = convert_model(base, calibration=ids)
    stock = unconverted(student)
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, expected)
    assert type(stock).__module__.startswith("transformers.")
    assert {p.data_ptr() for p in stock.parameters()} <= {p.data_ptr() for p in student.parameters()}
    with mode(stock, "teacher"), torch.no_grad():  # which is its own teacher
        assert torch.equal(stock(ids).logits, expected)


def test_without_attention_each_token_is_alone(subject: Subject) -> None:
    """A text of one token has nothing else to attend to: there the floor says what the teacher does, and so for every token."""
    ids = subject.text(9)
    with torch.no_grad():
        alone = torch.cat([subject.teacher(ids[:, i : i + 1]).logits for i in range(9)], dim=1)
        assert torch.allclose(subject.floor(ids).logits, alone, atol=1e-5)
        assert not torch.allclose(subject.teacher(ids).logits, alone, atol=1e-2)


def test_contexts_are_what_was_read(subject: Subject) -> None:
    """Snapshots at a context, static caches of them and copies for a batch go on as the whole text would."""
    ids = subject.text(31)
    with torch.no_grad():
        told = {name: getattr(subject, name)(ids).logits[0, [11, 30]] for name in ("model", "teacher")}
    for name, whole in told.items():
        model = getattr(subject, name)
        caches = snapshots(subject, model, [30, 11, 11], name)
        assert sorted(caches) == [11, 30]
        for context, expected in zip((11, 30), whole, strict=True):
            own = [stepper(model, caches[context])]
            if name == "teacher":
                own.append(stepper(model, static(subject, caches[context], 4)))
                assert isinstance(own[1].cache, StaticCache)
            for reader in own:
                assert torch.allclose(reader(ids[:, context : context + 1])[0], expected, atol=1e-5)
            many = copies(model, caches[context], 3)
            assert torch.allclose(many(ids[:, context : context + 1].expand(3, 1))[0], expected, atol=1e-5)
            assert many.nbytes() == 3 * own[0].nbytes()


# ---- each benchmark's arithmetic ----


def test_prefill(subject: Subject) -> None:
    """Student 2 ms a token, floor 1 ms, teacher T^2 / 100 ms: the student is ahead from 200 tokens on."""
    clock = clock_of(subject)
    moves(clock, subject.model, lambda _, given: 2e-3 * tokens_of(given))
    moves(clock, subject.floor, lambda _, given: 1e-3 * tokens_of(given))
    moves(clock, subject.teacher, lambda _, given: 1e-5 * tokens_of(given) ** 2)
    found = prefill(subject, [100, 400], 3)
    assert [r["name"] for r in found["rows"]] == ["student", "teacher", "floor"] * 2
    assert [r["seconds"]["median"] for r in found["rows"]] == pytest.approx([0.2, 0.1, 0.1, 0.8, 1.6, 0.4])
    assert all(r["seconds"]["runs"] == 3 and r["work"]["calls"] > 50 for r in found["rows"])
    assert [r["teacher_over_student"] for r in found["ratios"]] == pytest.approx([0.5, 2.0])
    assert [r["student_over_floor"] for r in found["ratios"]] == pytest.approx([2.0, 2.0])
    assert found["student_ahead_from"] == pytest.approx(200)
    flops = {r["name"]: r["work"]["flops"] for r in found["rows"] if r["length"] == 400}
    assert flops["floor"] < min(flops["student"], flops["teacher"])
    assert flops["teacher"] - flops["floor"] == pytest.approx(2 * 2 * 4 * 400 * 400 * 8)  # causal attention, two layers


def test_decode(subject: Subject) -> None:
    """The teacher's time grows with what it holds, and half as much on a static cache, which is then its best form."""
    clock = clock_of(subject)

    def teacher(_: Any, given: dict[str, Any]) -> float:
        cache = given["past_key_values"]
        return 1e-3 if isinstance(cache, StaticCache) else 1e-4 * int(cache.get_seq_length())

    moves(clock, subject.model, lambda _, given: 5e-4)
    moves(clock, subject.teacher, teacher)
    found = decode(subject, [4, 60], [10, 100], 3, {"student": subject.model})
    by = {(r["context"], r["name"]): r for r in found["rows"]}
    assert by[4, "student"]["seconds"]["median"] == by[60, "student"]["seconds"]["median"] == pytest.approx(5e-4)
    assert by[4, "teacher"]["seconds"] == pytest.approx({"median": 7e-4, "low": 6.5e-4, "high": 7.5e-4, "runs": 3})
    assert [r["best_teacher"] for r in found["ratios"]] == ["teacher", "teacher, static cache"]
    assert found["ratios"][1]["over_student"] == pytest.approx({"teacher": 63 / 5, "teacher, static cache": 2.0})
    assert found["flat"]["largest_over_smallest"] == pytest.approx(1.0)
    assert list(found["flat"]["seconds"]) == ["10", "100"]
    assert by[4, "student"]["work"]["nbytes"] == weight_bytes(subject.model)
    assert by[4, "student"]["cache_bytes"] == by[60, "student"]["cache_bytes"]
    assert by[60, "teacher"]["cache_bytes"] > 5 * by[4, "teacher"]["cache_bytes"]


def test_the_student_in_8_bits_and_compiled_is_measured_too(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each form reads its own weights, and the quickest one is compared to the teacher."""
    stepped: list[Any] = []
    monkeypatch.setattr(decoding, "compile_step", lambda model, report=None: stepped.append(model))
    students = students_of(subject, compiled=True, int8=True)
    assert list(students) == ["student", "student, int8", "student, compiled", "student, int8, compiled"]
    assert stepped == [students["student, compiled"], students["student, int8, compiled"]]
    students = {name: copy.deepcopy(model) for name, model in students.items()}
    clock = clock_of(subject)
    for name, seconds in zip(students, (4e-3, 3e-3, 2e-3, 1e-3), strict=True):
        moves(clock, students[name], lambda _, given, seconds=seconds: seconds)
    moves(clock, subject.teacher, lambda _, given: 5e-3)
    found = decode(subject, [4], [10, 20], 2, students)
    assert found["ratios"][0]["best_student"] == found["flat"]["name"] == "student, int8, compiled"
    assert found["ratios"][0]["over_student"]["teacher"] == pytest.approx(5.0)
    read = {r["name"]: r["work"]["nbytes"] for r in found["rows"]}
    assert read["student, int8"] == read["student, int8, compiled"] < 0.6 * read["student"] == 0.6 * read["student, compiled"]


def test_a_compiled_teacher_is_one_more_form(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operators cannot be counted one by one; its matrix products are those of the form that was compiled."""
    clock, calls = clock_of(subject), list[int]()

    def compiled(model: Any) -> Any:
        faster = unconverted(subject.model)
        moves(clock, faster, lambda _, given: float(calls.append(1) or 1e-4))  # type: ignore[func-returns-value]
        return faster

    monkeypatch.setattr(torch, "compile", compiled)
    moves(clock, subject.model, lambda _, given: 2e-4)
    moves(clock, subject.teacher, lambda _, given: 1e-3)
    found = decode(subject, [12], [], 2, {"student": subject.model}, compile_teacher=True)
    assert found["ratios"][0]["best_teacher"] == "teacher, static cache, compiled"
    assert found["ratios"][0]["over_student"]["teacher, static cache, compiled"] == pytest.approx(0.5)
    by = {r["name"]: r["work"] for r in found["rows"]}
    assert by["teacher, static cache, compiled"] == {**by["teacher, static cache"], "calls": 0}
    assert len(calls) == 3 + 2  # what may compile, then what is timed


def test_batch(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes as long for many as for one, so throughput is their number's; the teacher stops where its cache is too large."""
    clock = clock_of(subject)
    moves(clock, subject.model, lambda _, given: 0.5)
    moves(clock, subject.teacher, lambda _, given: 1.0 * len(given["input_ids"]))
    one = 20 * 2 * 2 * (8 + 8) * 4  # tokens, layers, kv heads, key and value, fp32
    assert kv_bytes(subject, 20) == one
    weights = sum(p.numel() * 4 for p in subject.model.parameters())
    monkeypatch.setattr(batches, "TEACHER_SHARE", 2.5 * one / (weights + 100 * one))
    monkeypatch.setattr(batches, "machine_memory", lambda device: weights + 100 * one)
    found = batch(subject, [1, 2, 8], context=20, steps=2)
    assert [(r["name"], r["sequences"], r["tokens_per_second"]) for r in found["rows"]] == [
        ("student", 1, 2), ("teacher", 1, 1), ("student", 2, 4), ("teacher", 2, 1), ("student", 8, 16)
    ]  # fmt: skip
    assert found["ratios"] == [{"sequences": n, "teacher_over_student": 2.0 * n} for n in (1, 2)]
    assert found["memory"]["sequences_of_kv"] == 100
    state = found["rows"][0]["cache_bytes"]
    assert found["rows"][-1]["cache_bytes"] == 8 * state
    assert found["memory"]["sequences_of_states"] == int(100 * one / state)
    assert found["rows"][-1]["kv_bytes"] == 8 * one


# ---- memory ----


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not let a peak begin again")
def test_a_peak_is_this_process_s_own_and_can_begin_again() -> None:
    """It is not that of whoever started the process, which getrusage would tell."""
    held = bytearray(b"1") * 300_000_000  # of tensors some may be kept
    large = peak_memory(CPU)
    code = "import torch; from linearize.devices import peak_memory; print(peak_memory(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert int(done.stdout) < large - 2e8
    del held
    assert forget_peak(CPU)
    assert abs(peak_memory(CPU) - held_memory(CPU)) < 5e7
    assert peak_memory(CPU) < large - 2e8


def test_a_measuring_process_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="no such folder"):
        probe("prefill", tmp_path / "nothing", dtype="auto", device="cpu", tokens=8, chunk=8)


# ---- beside ----


class Llama:
    """As much of llama-cpp-python as is used."""

    made: dict[str, Any]
    clock: Clock

    def __init__(self, **given: Any) -> None:
        type(self).made, self.tokens = given, 0

    def n_vocab(self) -> int:
        return 64

    def reset(self) -> None:
        self.tokens = 0

    def eval(self, ids: list[int]) -> None:
        self.tokens += len(ids)
        self.clock.now += 1e-4 * self.tokens


def test_llama_cpp_is_timed_beside_the_student(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", types.SimpleNamespace(Llama=Llama))
    Llama.clock, file = clock_of(subject), tmp_path / "model.gguf"
    file.write_bytes(b"x" * 1000)
    moves(clock_of(subject), subject.model, lambda _, given: 1e-3)
    moves(clock_of(subject), subject.teacher, lambda _, given: 1e-3)
    found = decode(subject, [100], [], 1, {"student": subject.model}, file=file)
    assert found["ratios"][0]["over_student"]["llama.cpp"] == pytest.approx(10.2)  # the 102nd token, one to warm up
    assert found["ratios"][0]["best_teacher"].startswith("teacher")
    (own,) = [r for r in found["rows"] if r["name"] == "llama.cpp"]
    assert own["bound"]["memory"] == pytest.approx(1000 / MACHINE.read / 1.02e-2)
    assert Llama.made["n_ctx"] > 101
    assert "flat" not in found


def test_llama_cpp_has_to_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError) as told:
        llama_cpp.need(tmp_path)
    assert told.value.fix == "pip install llama-cpp-python"
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UsageError, match="no such file"):
        llama_cpp.need(tmp_path / "no.gguf")


def test_an_evaluation_s_speed_enters_the_teacher_once(subject: Subject) -> None:
    entered = 0

    def context() -> Any:
        nonlocal entered
        entered += 1
        return mode(subject.model, "teacher")

    variants = {"teacher": Variant("teacher", subject.model, context), "student": Variant("student", subject.model)}
    found = speed(variants, [32, 64], 300, lambda done, total: None)
    assert entered == 1
    assert subject.model.linearize_mode == "student"
    assert found["rows"][1]["teacher"]["bytes"] == 64 * kv_bytes(subject, 1)
    assert all(math.isfinite(r[who]["decode_tokens_per_second"]) for r in found["rows"] for who in variants)
    whole = Reader(Variant("student", subject.model))
    whole.feed(subject.text(64), 5)
    assert found["rows"][1]["student"]["bytes"] == whole.nbytes()


def test_parts_that_are_not_asked_for_are_left_out(tmp_path: Path) -> None:
    from cli.tiny import write_model

    from linearize.conversion.convert import convert

    convert(str(write_model(tmp_path / "tiny")), options={"window": 8}, output=tmp_path / "out", device="cpu")
    found = bench_distill(
        tmp_path / "out", sequences=[16], kinds=["attention"], parts=[LENGTHS], lengths=[16], teacher_to=8, repeats=1, device="cpu"
    )
    assert [r["name"] for r in found["rows"]] == ["student, forward and backward"]
    assert set(found["by_length"]) == {"student"}
    assert "peak" not in found
    assert found["profiles"] == {}
    assert found["ratios"] == []


def test_a_method_that_transfers_nothing_has_no_peak_of_it(tmp_path: Path) -> None:
    from cli.tiny import write_model

    from linearize.conversion.convert import convert

    convert(str(write_model(tmp_path / "tiny")), method="window", output=tmp_path / "out", device="cpu")
    found = bench_distill(tmp_path / "out", sequences=[16], kinds=KINDS, parts=["peak"], repeats=1, device="cpu")
    assert "peak" not in found
    assert found["rows"] == []
