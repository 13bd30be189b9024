"""Every method on one model, both starts, at one budget of attention transfer: python recipes/compare_methods.py [METHOD ...].

The teacher runs once for a group of students, which all learn from its layers' own inputs: same data, order, loss and seed.
Finished methods are kept in the results file and not run again; `--shard 0/2` does every second one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize import text
from linearize.conversion.calibration_text import CalibrationText, calibration_ids
from linearize.conversion.convert import convert_in_memory, load_source
from linearize.conversion.plan import count_parameters, plan_for
from linearize.conversion.sources import resolve
from linearize.distillation.layer_losses import LayerCall, relative_mse
from linearize.distillation.loop import Schedule
from linearize.documents import BUILTIN, documents
from linearize.evaluation.fidelity import held_out_rows
from linearize.evaluation.perplexity import Variant, compare
from linearize.methods import names
from linearize.methods.base import CALIBRATED, STARTS
from linearize.methods.calibration import Calibration
from linearize.methods.layout import layout, stages_of
from linearize.modeling.attention import LinearizedAttention, set_mode
from linearize.modeling.mixer import Mixer
from linearize.modeling.modeling_linearized import ablated, attentions, mode, observed
from linearize.modeling.stream import Inputs
from linearize.serving.generate import Generator, Settings

SEQUENCE, SEED, CLIP = 1024, 0, 1.0
PROMPT, STEPS = "The sea is", 16
LEARNING_RATE = 1e-2


class Student:
    """One method's mixers for every layer of a host; a layer without one stays softmax."""

    def __init__(self, name: str, start: str, host: Any) -> None:
        self.name, self.start, self.places = name, start, layout(name, {}, start)
        torch.manual_seed(SEED)
        self.mixers: dict[int, Mixer] = {}
        for attention in attentions(host):
            place = self.place(attention.linearize_index)
            if place is not None:
                self.mixers[attention.linearize_index] = Mixer(place.mixer, attention.linearize.shape)
        parameters = [p for mixer in self.mixers.values() for p in mixer.parameters()]
        lr = next((stage.lr for stage in stages_of(name) if stage.kind == "attention"), LEARNING_RATE)
        self.parameters, self.lr = parameters, lr
        self.optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0) if parameters else None

    def place(self, index: int) -> Any:
        return self.places[index % len(self.places)]

    def initialise(self, index: int, calibration: Calibration) -> None:
        place = self.place(index)
        if place is not None and place.mixer.has_far:
            place.method.initialise(self.mixers[index], calibration)

    def learn(self, index: int, inputs: Inputs, target: Tensor) -> None:
        if index in self.mixers and self.optimizer is not None:
            with torch.enable_grad():
                loss = relative_mse(LayerCall(self.mixers[index], inputs, target))
            if loss.requires_grad and bool(loss.isfinite()):
                loss.backward()

    def step(self, factor: float) -> None:
        if self.optimizer is None:
            return
        for mixer in self.mixers.values():  # a layer's gradients are its own
            torch.nn.utils.clip_grad_norm_(mixer.parameters(), CLIP)
        if all(p.grad is None or bool(p.grad.isfinite().all()) for p in self.parameters):
            self.optimizer.param_groups[0]["lr"] = self.lr * factor
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def installed(self, host: Any) -> Iterator[Any]:
        """The host with these mixers in place of its own."""
        own = {a.linearize_index: a.linearize for a in attentions(host)}
        for attention in attentions(host):
            if attention.linearize_index in self.mixers:
                attention.linearize = self.mixers[attention.linearize_index].eval()
            else:
                set_mode(attention, "teacher")
        try:
            yield host
        finally:
            for attention in attentions(host):
                attention.linearize = own[attention.linearize_index]
                set_mode(attention, "student")


def perplexity(model: Any, rows: text.Packed, context: Any = nullcontext) -> float:
    return compare([Variant("one", model, context)], rows, lambda *_: None)[0].perplexity


def speed(model: Any, tokenizer: Any) -> float:
    """Tokens decoded a second after a short prompt."""
    generator = Generator(model, tokenizer)
    ids = tokenizer(PROMPT)["input_ids"]
    for _ in generator.stream(ids, generator.new_cache(), Settings(max_tokens=STEPS)):
        pass
    return float(generator.last["tokens_per_second"])


def observe_all(host: Any, row: Tensor, each: Any) -> None:
    """Run the teacher over one row and hand each layer's inputs and output to `each`."""

    def observe(attention: LinearizedAttention, inputs: Inputs, target: Tensor) -> None:
        each(attention.linearize_index, inputs, target)

    with torch.no_grad(), observed(host, observe), mode(host, "observe"):
        host(row, logits_to_keep=1)


def run_group(
    host: Any, group: list[str], training: text.Packed, ids: Tensor, rows: text.Packed, tokens: int
) -> Iterator[dict[str, Any]]:
    """Start, measure, train and measure a group of methods; yields a result for each."""
    started = {(name, start): Student(name, start, host) for name in group for start in STARTS}

    def begin(index: int, inputs: Inputs, target: Tensor) -> None:
        calibration = Calibration(inputs, target)
        for student in started.values():
            student.initialise(index, calibration)

    observe_all(host, ids, begin)
    before = {key: measured(student, host, rows) for key, student in started.items()}
    students = [started[name, CALIBRATED] for name in group]
    steps = -(-tokens // SEQUENCE)
    schedule = Schedule(training, steps, SEED, 1, 0)
    for step in range(steps):

        def learn(index: int, inputs: Inputs, target: Tensor) -> None:
            for student in students:
                student.learn(index, inputs, target)

        observe_all(host, training.ids[schedule.indices(step)], learn)
        for student in students:
            student.step(schedule.factor(step))
        print(f"{', '.join(group)}: step {step + 1} of {steps}", flush=True)
    for student in students:
        shape = attentions(host)[0].linearize.shape
        mixers = [mixer.spec for mixer in student.mixers.values()]
        far_off = None
        if all(s.has_near and s.has_far for s in mixers):
            with student.installed(host):
                far_off = perplexity(host, rows, lambda: ablated(host, "far"))
        yield {
            "method": student.name, **{start: before[student.name, start] for start in STARTS},
            "after": measured(student, host, rows), "far_off": far_off, "tokens": steps * SEQUENCE if student.parameters else 0,
            "state_bytes": sum(s.state_bytes(shape) for s in mixers), "parameters": sum(count_parameters(s, shape) for s in mixers),
            "softmax_layers": len(attentions(host)) - len(mixers), "date": date.today().isoformat(),
        }  # fmt: skip


def measured(student: Student, host: Any, rows: text.Packed) -> float:
    return perplexity(host, rows, lambda: student.installed(host))


def table(results: list[dict[str, Any]]) -> str:
    """The results as a table of README's kind, best first."""
    head = ["method", "published start", "calibrated start", "after transfer", "far off", "state", "+ params", "tok/s"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for r in sorted(results, key=lambda r: r["after"]):
        kept = f" + KV of {r['softmax_layers']}" if r["softmax_layers"] else ""
        far = "" if r["far_off"] is None else f"{r['far_off']:.2f}"
        cells = [f"`{r['method']}`", *(f"{r[key]:.4g}" for key in ("published", "calibrated", "after")), far]
        cells += [
            f"{r['state_bytes'] / 1e6:.1f} MB{kept}",
            f"{r['parameters'] / 1e6:.2f} M",
            f"{r['speed']:.1f}" if "speed" in r else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", default=[])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--evaluate", type=int, default=2, help="rows of 1,024 held-out tokens")
    parser.add_argument("--group", type=int, default=6, help="methods that share a run of the teacher")
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--results", type=Path, default=Path("compare_methods"))
    parser.add_argument("--speed", action="store_true", help="only measure decoding, on an idle machine")
    args = parser.parse_args()
    source = resolve(args.model)
    base, tokenizer = load_source(source, torch.float32)
    ids = calibration_ids(tokenizer, CalibrationText())[:1]
    host, _ = convert_in_memory(base.eval(), plan_for(source, "window", None, {}, CALIBRATED), ids, SEED, lambda *_, **__: None)
    training_docs, held_out = text.split(documents(BUILTIN))
    rows = held_out_rows(tokenizer, held_out, args.evaluate * SEQUENCE)
    print(f"teacher: perplexity {perplexity(host, rows, lambda: mode(host, 'teacher')):.2f}", flush=True)
    args.results.mkdir(exist_ok=True)
    done = {path.stem: json.loads(path.read_text()) for path in args.results.glob("*.json")}
    if args.speed:
        for name, result in done.items():
            if result["softmax_layers"]:
                continue  # the host's cache has no place for keys and values
            with Student(name, CALIBRATED, host).installed(host):
                result["speed"] = speed(host, tokenizer)
            (args.results / f"{name}.json").write_text(json.dumps(result))
    else:
        shard, shards = (int(x) for x in args.shard.split("/"))
        wanted = [name for name in args.methods or names() if name not in done][shard::shards]
        training = text.whole(text.tokenise(tokenizer, training_docs), SEQUENCE)
        for first in range(0, len(wanted), args.group):
            for result in run_group(host, wanted[first : first + args.group], training, ids, rows, args.tokens):
                (args.results / f"{result['method']}.json").write_text(json.dumps(result))
                done[result["method"]] = result
    print(table(list(done.values())))


if __name__ == "__main__":
    main()
