"""Attention transfer a few layers at a time: what all layers at once give, killed or not, and 3 GB of weights in 2 GB of memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.tiny import TEXT, environment, tokenizer, write_model
from flow.large import LIMIT, peak_of, write_large
from safetensors.torch import load_file

from linearize.cli import run as command
from linearize.conversion.architectures import ARCHITECTURES
from linearize.conversion.convert import convert
from linearize.distillation import streaming as streams
from linearize.distillation.run import distill
from linearize.distillation.streaming import Streaming
from linearize.distillation.streaming_cache import LayerInputs, row_keys
from linearize.errors import InputError, IntegrityError, ResourceError, UsageError
from linearize.methods.base import Stage
from linearize.testing.families import tiny_family

LENGTH, STEPS, LAYERS = 32, 12, 5
POLL, FREE = 0.02, 12e9
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    given = write_model(tmp_path_factory.mktemp("source") / "tiny", num_hidden_layers=LAYERS)
    return convert(str(given), output=given.parent / "linear", calibration=text, options={"window": 8}).path


def weights(where: Path) -> dict[str, torch.Tensor]:
    return {name: x for path in where.glob("*.safetensors") for name, x in load_file(path).items()}


def lines(where: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]


def transfer(folder: Path, text: Path, output: Path, layers: int | None = None, **more: Any) -> Any:
    given: dict[str, Any] = {"data": str(text), "stage": "attention", "sequence": LENGTH, "tokens": LENGTH * STEPS, "device": "cpu"}
    given["streaming"] = None if layers is None else Streaming(layers)
    return distill(folder, output=output, **{**given, **more})


@pytest.fixture(scope="module")
def joint(folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(transfer(folder, text, tmp_path_factory.mktemp("joint") / "out").path)


def same(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("layers", [1, 2, LAYERS + 1])
def test_blocks_give_what_all_layers_at_once_do(layers: int, joint: Path, folder: Path, text: Path, tmp_path: Path) -> None:
    """To the bit: weights, each layer's losses at each step; the folders hold the same files, and nothing else is left."""
    made = transfer(folder, text, tmp_path / "out", layers)
    same(joint, made.path)
    start = weights(folder)
    assert any(not torch.equal(x, start[name]) for name, x in weights(joint).items()), "something was learned"
    assert sorted(p.name for p in joint.iterdir()) == sorted(p.name for p in made.path.iterdir())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    for one, other in zip(lines(joint), lines(made.path), strict=True):
        assert one["layers"] == other["layers"]
        assert {key: one[key] for key in ("step", "tokens", "rate")} == {key: other[key] for key in ("step", "tokens", "rate")}
        assert one["loss"] == pytest.approx(other["loss"])


def test_what_is_drawn_depends_on_the_layer(folder: Path, text: Path, tmp_path: Path) -> None:
    """Windows are drawn anew for each layer and step, the same in blocks as for all layers at once."""
    sets = ["stages.attention.window_min=2", "stages.attention.window_dropout=0.2"]
    one, other, fixed = (
        transfer(folder, text, tmp_path / f"{k}{len(s)}", k, sets=s).path for k, s in ((None, sets), (2, sets), (2, []))
    )
    same(one, other)
    assert any(not torch.equal(x, weights(fixed)[name]) for name, x in weights(one).items()), "something was drawn"


def test_several_epochs_of_several_rows(folder: Path, text: Path, tmp_path: Path) -> None:
    """Within the rounding of products of other batches."""
    short = tmp_path / "short.txt"
    short.write_text(TEXT[:600])
    given: dict[str, Any] = {"batch": 3, "tokens": LENGTH * 3 * STEPS}
    one, other = (weights(transfer(folder, short, tmp_path / str(k), k, **given).path) for k in (None, 2))
    assert all(torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-5) for name in one)


UNLIKE = ("distilbert", "gemma2", "gpt2", "gpt_neox", "mixtral")  # the others only where there is time
FAMILIES = [pytest.param(name, marks=[] if name in UNLIKE else pytest.mark.exhaustive) for name in ARCHITECTURES]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, text: Path, tmp_path: Path) -> None:
    """Sliding, fused, encoders, mixtures: the layers are entered and left through the model's own forward."""
    words = tokenizer()
    tiny_family(family, vocab_size=len(words)).save_pretrained(tmp_path / "source")
    words.save_pretrained(tmp_path / "source")
    method = "default" if ARCHITECTURES[family].causal else "hedgehog"
    given = convert(str(tmp_path / "source"), output=tmp_path / "linear", calibration=text, method=method).path
    one, other = (transfer(given, text, tmp_path / str(k), k, tokens=LENGTH * 2).path for k in (None, 1))
    same(one, other)


def test_layers_that_learn_nothing(text: Path, tmp_path: Path) -> None:
    """Blocks of kept layers pass the teacher's states on."""
    given = write_model(tmp_path / "tiny", num_hidden_layers=LAYERS)
    made = convert(str(given), output=tmp_path / "some", calibration=text, layers="0,3").path
    same(*(transfer(made, text, tmp_path / str(k), k).path for k in (None, 1)))


def killed(folder: Path, text: Path, output: Path, block: int, step: int) -> int:
    """The exit code of a command that is killed at a step of a block."""
    arguments = [str(block), str(step), str(folder), "--data", str(text), "--sequence", str(LENGTH), "-o", str(output)]
    arguments += ["--tokens", str(LENGTH * STEPS), "--save-every", "5", "--stage", "attention", "--stream-layers", "2"]
    command = [sys.executable, str(HERE / "killed_block.py"), *arguments, "--device", "cpu"]
    return subprocess.run(command, capture_output=True, env=environment(), timeout=300, check=False).returncode


def test_a_killed_run_goes_on(joint: Path, folder: Path, text: Path, tmp_path: Path) -> None:
    """kill -9 at step 8 of the second of three blocks: to the bit, and the first is not trained again."""
    output = tmp_path / "out"
    assert killed(folder, text, output, 1, 8) == -9
    run = tmp_path / "out.run"
    assert {"done-000", "block-001", "inputs-001.bin", "inputs-002.bin"} <= {path.name for path in run.iterdir()}
    assert not output.exists()
    before = (run / "done-000" / "linearize.json").stat().st_mtime_ns
    with pytest.raises(InputError, match="--stream-layers 2 was interrupted here"):
        transfer(folder, text, output, 2)
    with pytest.raises(InputError, match="begun with --stream-layers"):
        transfer(folder, text, output, resume=True)
    with pytest.raises(InputError, match="stream_layers 2, not 1"):
        transfer(folder, text, output, 1, resume=True, save_every=5)
    assert (run / "done-000" / "linearize.json").stat().st_mtime_ns == before
    trained = []
    real = streams.Blocks._teach

    def teach(self: Any, number: int, *args: Any) -> Any:
        trained.append(number)
        return real(self, number, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams.Blocks, "_teach", teach)
        made = transfer(folder, text, output, 2, resume=True, save_every=5)
    assert trained == [1, 2]
    same(joint, made.path)
    assert [line["layers"] for line in lines(made.path)] == [line["layers"] for line in lines(joint)]


def test_what_does_not_fit_is_refused(folder: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"the layer inputs take .* more than the") as refused:
        transfer(folder, text, tmp_path / "out", streaming=Streaming(2, 1e-5))
    assert refused.value.fix.startswith("--tokens ")
    assert not list(tmp_path.rglob("*.bin"))
    assert not list((tmp_path / "out.run").iterdir())


def test_what_is_not_streamed_is_refused(folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="only one stage attention"):
        transfer(folder, text, tmp_path / "out", 2, stage="all")
    with pytest.raises(UsageError, match="by one process, not 2"):
        streams.check_streaming([Stage("attention", 1, 0.1)], 2, {})
    with pytest.raises(UsageError, match="--mixed-precision"):
        streams.check_streaming([Stage("attention", 1, 0.1)], 1, {"shard": False, "precision": "bfloat16"})
    assert command(["distill", str(folder), "--stream-cache", "2"]) == 2
    assert "--stream-layers" in capsys.readouterr().err


def test_layer_inputs(tmp_path: Path) -> None:
    """A row is there once `sync` said so; a file of another size is refused."""
    ids, positions = torch.arange(12).view(3, 4), torch.arange(4).expand(3, 4)
    keys, hidden = row_keys(ids, positions), torch.randn(3, 4, 5).to(torch.bfloat16)
    assert len({*keys, *row_keys(ids, positions + 1)}) == 6
    slots = {key: slot for slot, key in enumerate(keys)}
    first = LayerInputs(tmp_path / "x.bin", slots)
    first.write(keys[:2], hidden[:2])
    first.sync()
    first.write(keys[2:], hidden[2:])
    second = LayerInputs(tmp_path / "x.bin", slots)
    assert torch.equal(second.read([keys[1], keys[0]]), hidden[[1, 0]])
    assert second.missing() == 1
    with pytest.raises(IntegrityError, match="row 2 of the layer inputs is missing"):
        second.read(keys[2:])
    second.write(keys, hidden + 1)
    assert torch.equal(second.read(keys), torch.cat([hidden[:2], hidden[2:] + 1])), "what is there is not written again"
    with (tmp_path / "x.bin").open("ab") as file:
        file.write(b"more")
    with pytest.raises(IntegrityError, match="layer inputs of"):
        LayerInputs(tmp_path / "x.bin", slots)


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_three_gigabytes_in_two(tmp_path: Path) -> None:
    """The command on a model of 3 GB, killed once its resident memory, mapped pages of files included, has passed 2 GB."""
    if (free := shutil.disk_usage(tmp_path).free) < FREE:
        pytest.skip(f"needs {FREE / 1e9:.0f} GB of disk, {free / 1e9:.1f} GB are free")
    (tmp_path / "book.txt").write_text(TEXT)
    given = write_large(tmp_path / "large", layers=11)
    convert(str(given), output=tmp_path / "linear", calibration=tmp_path / "book.txt", device="cpu")
    shutil.rmtree(given)
    assert sum(path.stat().st_size for path in (tmp_path / "linear").glob("*.safetensors")) > 3e9
    arguments = ["distill", tmp_path / "linear", "-o", tmp_path / "out", "--data", tmp_path / "book.txt", "--stage", "attention"]
    more = ["--stream-layers", 2, "--tokens", 1024, "--sequence", 256, "--device", "cpu"]
    command = [sys.executable, "-m", "linearize", *map(str, [*arguments, *more])]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, peak_of(process))
        if peak > LIMIT:
            process.kill()
        time.sleep(POLL)
    print(f"peak {peak / 1e9:.2f} GB")
    assert 0.1e9 < peak < LIMIT
    assert process.returncode == 0
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) > 3e9
    shutil.rmtree(tmp_path)
