"""The kernels for what a model does of its own: norms, gates, rotations in bfloat16, products of few rows; and whose they are."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from called_kernels import DEFAULT, needs_kernels, recorded
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from linearize import convert_model
from linearize.modeling import native, native_operators, one_pass, recurrence_additive
from linearize.modeling.attention import RecordedNorm
from linearize.modeling.native_model import rms_norm, rope_half, swiglu, takes_own
from linearize.modeling.native_operators import FEW, additive_step, feed_forward, matvec, takes_few
from linearize.serving.int8 import Int8Linear
from linearize.testing import linearized
from linearize.testing.families import tiny_family
from linearize.testing.laws import EXACT, assert_close

CHECKS = ("test_schema", "test_faketensor")
FLAGS = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
BOUND = {torch.float32: EXACT[torch.float32], torch.bfloat16: 2.0**-8}  # half a unit in the last place, of each number


@pytest.fixture(autouse=True)
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are called."""
    return recorded(monkeypatch)


def near(found: Tensor, expected: Tensor, roundings: int = 1) -> None:
    """Each number by itself, rounded so often."""
    bound = roundings * 1.01 * BOUND[found.dtype]
    assert bool(((found.double() - expected).abs() <= bound * expected.abs() + 1e-6 * expected.abs().max()).all())


@needs_kernels
@BOTH
@pytest.mark.parametrize("width", [16, 48, 576])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_rms_norm(size: float, width: int, dtype: torch.dtype, called: list[str]) -> None:
    """Rows so small that eps counts, too; a view of a larger tensor; the same as transformers' own, but for the order of a sum."""
    norm = LlamaRMSNorm(width, eps=1e-5).to(dtype)
    norm.weight = nn.Parameter(torch.randn(width).to(dtype), requires_grad=False)
    for rows in (1, 3, 700):
        x = (size * torch.randn(rows, 2, 2 * width)).to(dtype)[..., :width]
        found, wide = rms_norm(x, norm.weight, 1e-5), x.double()
        near(found, norm.weight.double() * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5), roundings=2)
        if dtype == torch.bfloat16:
            assert (found != norm(x)).double().mean() < 1e-2
    assert set(called) == {f"rms_norm_{'float' if dtype == torch.float32 else 'half'}"}


@needs_kernels
@BOTH
def test_swiglu(dtype: torch.dtype, called: list[str]) -> None:
    """Gates that are shut and open altogether, and numbers that are none."""
    for shape in ((1, 1, 16), (2, 40, 96), (3, 400, 48)):
        gate, up = (8 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
        gate[0, 0, :4] = torch.tensor([-300.0, 300.0, 0.0, -60.0])
        wide = gate.double()
        near(swiglu(gate, up), wide * wide.sigmoid() * up.double(), roundings=2)
        if dtype == torch.bfloat16 and gate.numel() > 1000:  # but for the one that is not quite shut
            assert (swiglu(gate, up) != nn.functional.silu(gate) * up).double().mean() < 1e-2
    gate[0, 0, :2] = torch.tensor([torch.nan, torch.inf])
    found = swiglu(gate, up.abs() + 1)
    assert found[0, 0, 0].isnan()
    assert found[0, 0, 1] == torch.inf
    assert set(called) == {f"swiglu_{'float' if dtype == torch.float32 else 'half'}"}


@needs_kernels
@pytest.mark.parametrize("dim, width", [(32, 32), (72, 64), (64, 32)])
def test_rotation_of_a_model_in_bfloat16(dim: int, width: int, called: list[str]) -> None:
    """To the bit what transformers' own comes to; channels beyond those that turn stay as they are."""
    for time, texts in ((1, 1), (2, 2), (17, 1), (40, 2)):
        x = torch.randn(2, time, 3, dim).bfloat16().transpose(1, 2)  # as projections leave it
        cos, sin = torch.rand(texts, time, width).bfloat16() + 0.2, torch.randn(texts, time, width).bfloat16()
        turned = apply_rotary_pos_emb(x[..., :width], x[..., :width], cos, sin)[0]
        assert torch.equal(rope_half(x, cos, sin), torch.cat([turned, x[..., width:]], dim=-1))
    assert set(called) == {"rope_half"}


@needs_kernels
@BOTH
@pytest.mark.parametrize("depth", [1, 7, 16, 63, 64, 100, 576])
def test_few_rows_times_a_matrix(depth: int, dtype: torch.dtype) -> None:
    """Weights in the model's own dtype and in 8 bits; more outputs than one thread takes alone, or fewer than there are threads."""
    for rows, outputs in ((1, 1), (2, 5), (FEW, 333), (1, 1100)):
        x, bias = torch.randn(1, rows, depth).to(dtype), torch.randn(outputs).to(dtype)
        weight, eighths = torch.randn(outputs, depth).to(dtype), torch.randint(-127, 128, (outputs, depth)).to(torch.int8)
        scale = torch.rand(outputs).to(torch.bfloat16)
        own = eighths.double() * scale.double()[:, None]
        for given, wide, factor in ((weight, weight.double(), None), (eighths, own, scale)):
            for added in (bias, None):
                found = matvec(x, given, added, factor)
                near(found, x.double() @ wide.T + (0 if added is None else added.double()))
                assert found.dtype == dtype
    torch.library.opcheck(
        native_operators._made("matvec"), (x, eighths, scale, bias), test_utils=("test_schema", "test_faketensor")
    )


@needs_kernels
@pytest.mark.parametrize("size", [0.0, 2.0**-124, 2.0**-112, 2.0**-98, 1e-3, 1.0, 2.0**100])
def test_rows_in_bfloat16_keep_their_numbers_beside_weights_in_8_bits(size: float) -> None:
    """Each by itself, times one: to the bit down to 2^-15 of the row's largest, else within 2^-23 of that, or 2^-123."""
    depth = 64 + 37
    exponents = torch.arange(depth) % 40
    x = size * torch.stack([(torch.randint(-255, 256, (depth,)) / 128.0).bfloat16() * 2.0**-exponents for _ in range(3)])[None]
    x[0, :, 0], x[0, 1] = 1.9921875 * size, -x[0, 0]
    found = matvec(x.bfloat16(), torch.eye(depth).to(torch.int8), None, torch.ones(depth))
    wanted, largest = x.bfloat16(), x.abs().amax(-1, keepdim=True).float()
    close = wanted.abs() >= (2.0**-15 * largest).clamp(min=2.0**-115)
    assert torch.equal(found[close], wanted[close])
    assert (found.double() - wanted.double()).abs().max() <= max(2.0**-23 * float(largest.max()), 2.0**-123)


@needs_kernels
@pytest.mark.skipif("avx512_vnni" not in FLAGS, reason="the processor multiplies no bytes")
def test_bytes_are_multiplied_where_the_processor_does() -> None:
    """A sum that is exact in whole numbers, and loses its middle in float32."""
    x, weight = torch.zeros(1, 1, 192), torch.zeros(3, 192, dtype=torch.int8)
    x[0, 0, ::64] = torch.tensor([255, 2.0**-12, 255])
    weight[:, ::64] = torch.tensor([127, 1, -127], dtype=torch.int8)
    assert matvec(x.bfloat16(), weight, None, torch.ones(3)).tolist() == [[[2.0**-12] * 3]]


@needs_kernels
def test_rows_without_numbers_beside_weights_in_8_bits() -> None:
    """Of a row with an infinity or none nothing is known, and the others are as they are."""
    x, weight = torch.randn(1, 4, 70).bfloat16(), torch.randint(-127, 128, (9, 70)).to(torch.int8)
    alone = matvec(x, weight, None, torch.ones(9))
    x[0, 1, 3], x[0, 2, 66] = torch.inf, torch.nan
    found = matvec(x, weight, None, torch.ones(9))
    assert not found[0, 1:3].isfinite().any()
    assert torch.equal(found[0, ::3], alone[0, ::3])


@needs_kernels
@pytest.mark.parametrize("depth", [(1 << 20) - 64, (1 << 20) + (1 << 16)])  # of bytes, and where they would be too many
@pytest.mark.parametrize("sign", [1, -1])
def test_long_rows_beside_weights_in_8_bits(depth: int, sign: int) -> None:
    """The largest sums there are."""
    x = torch.full((1, 1, depth), sign * 1.9921875 * 2.0**-7).bfloat16()
    x[..., 0] = 1  # by whose steps the middle byte of all others is as large as can be
    weight = torch.full((4, depth), -128, dtype=torch.int8)
    weight[2] = 127
    near(matvec(x, weight, None, torch.ones(4)), x.double() @ weight.double().T)


@needs_kernels
@BOTH
@pytest.mark.parametrize("eighths", [(), (0, 1, 2), (2,), (1,)], ids=str)
def test_few_rows_through_a_gate(eighths: tuple[int, ...], dtype: torch.dtype) -> None:
    """To the bit what its three products and the gate between come to; some of the weights in 8 bits; idle threads."""
    for rows, width, inner in ((1, 7, 16), (2, 64, 48), (FEW, 40, 336), (1, 200, 400)):
        x = torch.randn(1, rows, width).to(dtype)
        weights = [torch.randn(size).to(dtype) for size in ((inner, width), (inner, width), (width, inner))]
        scales: list[Tensor | None] = [None] * 3
        for i in eighths:
            weights[i], scales[i] = torch.randint(-127, 128, weights[i].shape).to(torch.int8), torch.rand(len(weights[i])) / 127
        kept = [weight.clone() for weight in weights]
        found = feed_forward(x, weights, scales)
        gate, up, down = zip(weights, scales, strict=True)
        inside = swiglu(matvec(x, gate[0], scale=gate[1]), matvec(x, up[0], scale=up[1]))
        assert torch.equal(found, matvec(inside, down[0], scale=down[1]))
        assert all(map(torch.equal, weights, kept))
    torch.library.opcheck(
        native_operators._made("feed_forward"), (x, *weights, *scales), test_utils=("test_schema", "test_faketensor")
    )


@needs_kernels
def test_who_has_a_gate_of_few_rows_take_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 8 bits too; not where its parts have more to do, or someone listens to them, nor as the teacher."""
    made: list[bool] = []
    monkeypatch.setattr(one_pass, "feed_forward", lambda *given: made.append(True) or feed_forward(*given))
    for change, wanted in (
        (lambda mlp: None, True),
        (lambda mlp: mlp.gate_proj.register_forward_hook(lambda *_: None), False),
        (lambda mlp: mlp.down_proj.register_forward_pre_hook(lambda *_: None), False),
        (lambda mlp: setattr(mlp.up_proj, "forward", mlp.up_proj.forward), False),
        (lambda mlp: setattr(mlp.up_proj, "bias", nn.Parameter(torch.zeros(mlp.up_proj.out_features))), False),
        (lambda mlp: setattr(mlp, "linearize_plain", True), False),
        (lambda mlp: mlp.set_submodule("up_proj", Int8Linear(mlp.up_proj)), True),
    ):
        model = tiny_family("llama", intermediate_size=64)
        one_pass.in_one_pass(model)
        mlp = model.model.layers[0].mlp
        x = torch.randn(1, 1, model.config.hidden_size)
        with torch.no_grad():
            change(mlp)
            made.clear()
            found = mlp(x)
            gate = swiglu(mlp.gate_proj(x), mlp.up_proj(x))
            torch.testing.assert_close(found, mlp.down_proj(gate))
        assert bool(made) == wanted
    assert mlp(x).requires_grad


@needs_kernels
@pytest.mark.parametrize("decays", [None, 2, 3])
@pytest.mark.parametrize("width", [1, 16, 65])
def test_a_token_enters_a_memory_and_is_read_for(width: int, decays: int | None) -> None:
    """Without decay, with one a head and one a channel, some of which forget all; the state that was stays as it was."""
    for batch, memories, readers, keys in ((1, 1, 1, 1), (2, 3, 2, 7), (1, 3, 3, 128)):
        q, k, v = (
            torch.randn(batch, memories, readers, keys),
            torch.randn(batch, memories, keys),
            torch.randn(batch, memories, width),
        )
        state = torch.randn(batch, memories, keys, width)
        g = None if decays is None else -3 * torch.rand((batch, memories, keys)[:decays])
        if g is not None:
            g.view(-1)[0] = -torch.inf
        before = state.clone()
        tokens = (x if x is None else x.double()[:, :, None] for x in (k, v, g))
        expected = recurrence_additive.reference(q.double()[..., None, :], *tokens, state.double())
        out, after = recurrence_additive.step(q, k, v, g, state)
        assert_close(out, expected[0][..., 0, :], EXACT[torch.float32], "read")
        assert_close(after, expected[1], EXACT[torch.float32], "state")
        assert torch.equal(state, before)
        assert torch.equal(out, additive_step(q, k, v, g, state)[0])
    torch.library.opcheck(
        native_operators._made("additive_step"), (q, k, v, g, state), test_utils=("test_schema", "test_faketensor")
    )


@needs_kernels
def test_whose_rows_are_few() -> None:
    x, weight = torch.randn(1, FEW, 32), torch.randn(48, 32)
    assert takes_few(x, weight)
    assert takes_few(x.bfloat16(), weight.bfloat16(), others=(torch.zeros(48).bfloat16(),))
    assert takes_few(x, torch.zeros(48, 32, dtype=torch.int8))
    for own, other in (
        (torch.randn(1, FEW + 1, 32), weight), (x.half(), weight.half()), (x.double(), weight.double()), (x, weight.bfloat16()),
        (x, torch.randn(32, 48).T), (x.clone().requires_grad_(), weight), (x, weight.clone().requires_grad_()),
    ):  # fmt: skip
        assert not takes_few(own, other)
    with torch.no_grad():
        assert takes_few(x.clone().requires_grad_(), weight)


def kinds(family: str, **changes: Any) -> set[str]:
    """Which of the three a family's modules become."""
    model = tiny_family(family, **changes)
    one_pass.in_one_pass(model)
    mixins = (one_pass.OnePassNorm, one_pass.OnePassGate, one_pass.OnePassLinear)
    return {mixin.__name__ for mixin in mixins for module in model.modules() if isinstance(module, mixin)}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2"])
def test_modules_are_asked_what_they_compute(family: str) -> None:
    assert kinds(family) >= {"OnePassGate", "OnePassLinear"}
    assert ("OnePassNorm" in kinds(family)) == (family != "olmo2")  # whose norm multiplies before it rounds


def test_who_computes_something_else_stays_as_it_is() -> None:
    assert kinds("gemma") == {"OnePassLinear"}  # norms weigh by 1 + w, gates are GELU's
    assert kinds("gpt_neox") == {"OnePassLinear"}
    assert kinds("llama", hidden_act="gelu") == {"OnePassNorm", "OnePassLinear"}
    assert kinds("llama", mlp_bias=True) == {"OnePassNorm", "OnePassGate", "OnePassLinear"}
    assert not one_pass.normalises(GemmaRMSNorm(32))
    assert not one_pass.normalises(nn.LayerNorm(32, bias=False))
    assert one_pass.normalises(LlamaRMSNorm(32))


def test_two_of_one_class_may_differ() -> None:
    model = tiny_family("llama")
    model.model.layers[1].mlp.act_fn = nn.GELU()
    one_pass.in_one_pass(model)
    assert [isinstance(layer.mlp, one_pass.OnePassGate) for layer in model.model.layers] == [True, False, True]


def test_a_probe_leaves_no_trace() -> None:
    """Neither in the module, nor in the generator; modules on no device are asked as well, and what is made can be pickled."""
    model, before = tiny_family("llama"), torch.get_rng_state()
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    one_pass.in_one_pass(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    with torch.device("meta"):
        assert one_pass.normalises(LlamaRMSNorm(32))
    norm = model.model.norm
    assert type(pickle.loads(pickle.dumps(norm))) is type(norm)


def test_a_recorded_norm_is_recorded_before_it_is_computed() -> None:
    model = linearized(tiny_family("qwen3", head_dim=32), replace(DEFAULT, far_norm=False, far_rope=False))
    order = [c.__name__ for c in type(model.model.layers[0].self_attn.q_norm).__mro__]
    assert order.index("RecordedNorm") < order.index("OnePassNorm")
    assert issubclass(type(model.model.layers[0].self_attn.q_norm), RecordedNorm)


@needs_kernels
@BOTH
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_model_with_them_and_without(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, called: list[str]) -> None:
    """Logits of a text and of a step after it; and all gradients, which take none of these."""
    sizes = {"head_dim": 32, "hidden_size": 64, "intermediate_size": 96}
    model = convert_model(tiny_family(family, **sizes), method="default").to(dtype)
    ids = torch.randint(2, 97, (2, 30), generator=torch.Generator().manual_seed(1))
    found, ends = [], ("float" if dtype == torch.float32 else "half")
    for backend in ("native", "torch"):
        monkeypatch.setenv("LINEARIZE_BACKEND", backend)
        called.clear()
        with torch.no_grad():
            whole = model(ids, use_cache=True)
            step = model(ids[:, :1], past_key_values=whole.past_key_values).logits
        assert ({f"rms_norm_{ends}", f"swiglu_{ends}"} <= set(called)) == (backend == "native")
        called.clear()
        loss = model(ids).logits.float().square().mean()
        assert not {f"rms_norm_{ends}", f"swiglu_{ends}"} & set(called)
        found.append([whole.logits, step, *torch.autograd.grad(loss, [x for x in model.parameters() if x.requires_grad])])
    bound = 1e-4 if dtype == torch.float32 else 5e-2
    for own, other in zip(*found, strict=True):
        assert_close(own.float(), other.float(), bound, family)


@needs_kernels
def test_a_rotation_is_bound_for_bfloat16(called: list[str]) -> None:
    model = convert_model(tiny_family("llama", head_dim=32), method="default").to(torch.bfloat16)
    with torch.no_grad():
        model(torch.arange(2, 12)[None])
    assert "rope_half" in called
    called.clear()
    model(torch.arange(2, 12)[None])  # what has gradients is PyTorch's
    assert "rope_half" not in called


@needs_kernels
def test_whose_numbers_a_kernel_takes() -> None:
    x = torch.randn(2, 32)
    assert takes_own(x, x)
    assert takes_own(x.bfloat16())
    for given in ((x, x.bfloat16()), (x.half(),), (x[:, :20],), (x.double(),), (x.clone().requires_grad_(),)):
        assert not takes_own(*given)
    assert native.takes(x)
    assert not native.takes(x.bfloat16())
