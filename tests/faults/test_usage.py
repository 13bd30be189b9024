"""Commands that cannot be meant, outputs that must not be touched, data that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli.tiny import Cli, write_model

from .fault import Fault, trial, write

DISTILL = "distill tiny-default --tokens 128 --sequence 64"

USAGE = [
    Fault("unknown verb", 2, "no such command 'covert'", "covert", fix="did you mean 'convert'"),
    Fault("unknown flag", 2, "no such option: --metod", "convert tiny --metod y", fix="--method"),
    Fault("no model", 2, "missing argument 'MODEL'", "convert", fix="linearize convert --help"),
    Fault("unknown method", 2, "unknown method 'hedgehg'", "convert tiny --method hedgehg", fix="'hedgehog'"),
    Fault("method unlike any", 2, "unknown method 'xyz'", "methods xyz", fix="linearize methods"),
    Fault("unknown model", 2, "unknown model 'lama'", "convert lama", fix="did you mean 'llama'"),
    Fault("model folder not there", 2, "unknown model './nowhere'", "convert ./nowhere"),
    Fault("model is a text file", 2, "not a model folder or .gguf file", "convert book.txt"),
    Fault("unknown option of a method", 3, "unknown option 'windw'", "plan tiny --set windw=8", fix="'window'"),
    Fault("option of another type", 3, "window must be int, got 'wide'", "plan tiny --set window=wide"),
    Fault("option not key=value", 2, "'window' is not key=value", "plan tiny --set window", fix="--set window=VALUE"),
    Fault("option set twice", 2, "'window' is set twice", "plan tiny --set window=1 --set window=2"),
    Fault("illegal point", 3, "needs slots", "plan tiny --set slot_score=recall", fix="linearize methods default"),
    Fault(
        "target of no learnt score", 3, "slot_target belongs to slot_score", "plan tiny --set slots=8 --set slot_target=mean_square"
    ),
    Fault("fade of no learnt score", 3, "slot_fade belongs to slot_score 'learned'", "plan tiny --set slots=8 --set slot_fade=0.3"),
    Fault(
        "a score that grows with age",
        3,
        "slot_fade must be at least 0",
        "plan tiny --set slots=8 --set slot_score=learned --set slot_fade=-1",
    ),
    Fault(
        "two methods",
        2,
        "the recipe names the method",
        "plan tiny -m liger --recipe r.yaml",
        write("r.yaml", b"recall: 0"),
        "--recipe",
    ),
    Fault("layer not there", 3, "layer 7 does not exist", "plan tiny --layers 7"),
    Fault("layers not readable", 3, "cannot read the layers 'x'", "plan tiny --layers x", fix="every:4"),
    Fault("number out of range", 2, "'--temperature'", "generate tiny-default --prompt a --temp -1"),
    Fault("number not one", 2, "'--temperature'", "generate tiny-default --prompt a --temp abc"),
    Fault("token count not one", 2, "'many' is not a number of tokens", "distill tiny-default --tokens many"),
    Fault("unknown start", 2, "'--start'", "plan tiny --start random"),
    Fault("missing device", 5, "device 'cuda:77' is not available", "convert tiny -o new --device cuda:77", fix="--device cpu"),
]
OUTPUTS = [
    Fault("exists", 2, r"output folder exists \(\d+ files\)", "convert tiny -o tiny-default", fix="--overwrite"),
    Fault("exists, not ours", 2, r"output folder exists \(1 files\)", "convert tiny -o out", write("out/mine", b"1"), "-o out-2"),
    Fault(
        "not ours to delete", 2, "deletes checkpoints only", "convert tiny -o out --overwrite", write("out/mine", b"1"), "-o out-2"
    ),
    Fault("in a file", 2, "output would lie in a file", "convert tiny -o mine/out", write("mine", b"1"), "-o"),
    Fault("is a file", 2, "the output is a file", "convert tiny -o out", write("out", b"")),
    Fault("is the source", 2, "the output is the source", "convert tiny -o tiny --overwrite"),
    Fault("inside the source", 2, "the output is the source", "convert tiny -o tiny/out"),
    Fault("is here", 2, "the output cannot be the current folder", "convert tiny -o '' --overwrite"),
    Fault("distilled: exists", 2, "output folder exists", f"{DISTILL} -o out", write("out/mine", b"1"), "-o out-2"),
    Fault("distilled: not ours", 2, "checkpoints only", f"{DISTILL} -o out --overwrite", write("out/mine", b"1"), "-o out-2"),
    Fault("target before any stage", 2, "no projection 'x'", f"{DISTILL} --set stages.lora.targets=x", fix="any of q, k"),
    Fault("another method", 3, "a method is not set, it is default", f"{DISTILL} --set method=lolcats", fix="another recipe"),
    Fault(
        "layers that are not", 3, "slots@1-9 names layer .*layers 0–", "convert tiny --set slots@1-9=8 -o out", fix="fewer layers"
    ),
    Fault("teacher not there", 2, "unknown model './nothere'", "eval tiny-default --teacher ./nothere"),
    Fault(
        "teacher of another size",
        4,
        "the teacher has num_hidden_layers 3, the checkpoint num_hidden_layers 2: ./other",
        "eval tiny-default --teacher ./other",
        lambda: write_model(Path("other"), num_hidden_layers=3),
    ),
    Fault("page is a folder", 2, "the page is a folder", "report tiny-default -o .", fix="report.html"),
    Fault("page in no folder", 2, "no such folder", "report tiny-default -o nowhere/x.html", fix="-o"),
    Fault("page is the user's", 2, "is no report", "report tiny-default -o thesis.txt", write("thesis.txt", b"1"), "another file"),
    Fault("distilled: is its source", 2, "the output is the source", f"{DISTILL} -o tiny-default --overwrite"),
]
DATA = [
    Fault("calibration empty", 3, "the text is empty", "convert tiny --calibration a.txt", write("a.txt", b" \n")),
    Fault("calibration not UTF-8", 3, "not UTF-8", "convert tiny --calibration a.txt", write("a.txt", b"caf\xe9"), "iconv"),
    Fault("calibration not there", 3, "no text found", "convert tiny --calibration no.txt"),
    Fault("data empty", 3, "the text is empty", f"{DISTILL} --data a.txt", write("a.txt", b"")),
    Fault("data not UTF-8", 3, "not UTF-8", f"{DISTILL} --data a.txt", write("a.txt", b"\xff\xfe"), "iconv"),
    Fault("data not there", 3, "no text found", f"{DISTILL} --data no.txt"),
    Fault("rows not JSON", 3, "not JSON: a.jsonl:2", f"{DISTILL} --data a.jsonl", write("a.jsonl", b'{"text": "a"}\n{')),
    Fault("rows without text", 3, "has body; expected text", f"{DISTILL} --data a.jsonl", write("a.jsonl", b'{"body": "a"}')),
    Fault("data too little", 3, "fewer than one row", f"{DISTILL} --data a.txt", write("a.txt", b"one two")),
    Fault("evaluation data empty", 3, "the text is empty", "eval tiny-default --data a.txt", write("a.txt", b"")),
]


@pytest.mark.parametrize("fault", [*USAGE, *OUTPUTS, *DATA], ids=lambda fault: fault.name)
def test_refused(fault: Fault, cli: Cli, here: Path) -> None:
    trial(fault, cli)
