"""What every feature map promises a mixer, and each map against its equation written out for single vectors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from linearize.modeling.feature_maps import FEATURE_MAPS
from linearize.modeling.feature_maps_basic import FeatureMap
from linearize.modeling.spec import FEATURE_MAPS as NAMES
from linearize.modeling.spec import MixerSpec
from linearize.modeling.spec_maps import MAPS, map_width

HEADS, DIM, LENGTH, TOKENS = 3, 8, 64, 12
LEARNED = tuple(name for name, traits in MAPS.items() if traits.sized and name != "performer")
SETTINGS = [(name, size) for name in NAMES for size in ((0, 5, 12) if MAPS[name].sized else (0,))]


def spec_of(name: str, size: int = 0, **fields: object) -> MixerSpec:
    return MixerSpec(feature_map=name, feature_dim=size, max_length=LENGTH if name == "cosformer" else 0, **fields)


def build(name: str, size: int = 0, role: str = "k", heads: int = HEADS, dim: int = DIM, shake: bool = True) -> FeatureMap:
    phi = FEATURE_MAPS[name](heads, dim, spec_of(name, size), role)
    for tensor in phi.parameters() if shake else ():
        tensor.data += 0.1 * torch.randn_like(tensor)
    if name == "lln" and shake:
        phi.scale.copy_(torch.rand(heads) + 0.5)
    return phi


def inputs(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    return scale * torch.randn(2, HEADS, TOKENS, DIM, dtype=dtype), torch.stack([torch.arange(TOKENS), torch.arange(TOKENS) + 40])


def vectors(name: str, size: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor, FeatureMap, FeatureMap]:
    """One q and one k of head 0, what two maps make of them, and the maps."""
    maps = tuple(build(name, size, role).requires_grad_(False) for role in "qk")
    x = [scale * torch.randn(1, HEADS, 1, DIM, dtype=torch.float64) for _ in maps]
    position = torch.zeros(1, 1, dtype=torch.int64)
    q, k = (phi(value, position)[0, 0, 0] for phi, value in zip(maps, x, strict=True))
    return x[0][0, 0, 0], x[1][0, 0, 0], q, k, *maps


def applied(weight: Tensor, x: Tensor) -> Tensor:
    """W of head 0 times one vector."""
    rows = weight[0].tolist()
    return torch.tensor(
        [sum(v * row[j] for v, row in zip(x.tolist(), rows, strict=True)) for j in range(len(rows[0]))], dtype=x.dtype
    )


def test_names() -> None:
    assert set(FEATURE_MAPS) == set(NAMES)


@pytest.mark.parametrize("role", ["q", "k"])
@pytest.mark.parametrize("name, size", SETTINGS)
def test_width_shape_and_dtype(name: str, size: int, role: str) -> None:
    for dtype in (torch.float32, torch.float64):
        phi, (x, position) = build(name, size, role), inputs(dtype)
        out = phi(x, position)
        assert phi.width == map_width(name, DIM, size)
        assert out.shape == (2, HEADS, TOKENS, phi.width)
        assert out.dtype == dtype
        assert all(tensor.dtype == torch.float32 and tensor.shape[0] == HEADS for tensor in phi.state_dict().values())


def test_slots_do_not_widen_a_map() -> None:
    spec = MixerSpec(feature_map="l2norm", feature_dim=5, rule="slots", decay="channel", normalise=False)
    assert FEATURE_MAPS["l2norm"](HEADS, DIM, spec, "k").width == DIM


def test_a_role_is_q_or_k() -> None:
    with pytest.raises(ValueError, match="'q' or 'k'"):
        FEATURE_MAPS["relu"](HEADS, DIM, spec_of("relu"), "v")


@pytest.mark.parametrize("name, size", [s for s in SETTINGS if MAPS[s[0]].positive])
def test_positive(name: str, size: int) -> None:
    q, k = (build(name, size, role)(*inputs(torch.float64)) for role in "qk")
    assert MAPS[name].signed or bool((q >= 0).all() and (k >= 0).all())
    products = q @ k.transpose(-1, -2)
    assert bool((products >= 0).all())
    assert bool((products.sum((-1, -2)) > 0).all())


def extremes() -> dict[str, Tensor]:
    shape = (1, HEADS, TOKENS, DIM)
    signs = torch.randint(0, 2, shape) * 2.0 - 1.0
    return {
        "zero": torch.zeros(shape),
        "both": 60 * signs,
        "high": torch.full(shape, 60.0),
        "low": torch.full(shape, -60.0),
        "sparse": torch.randn(shape) * (torch.rand(shape) < 0.5),
        "random": torch.randn(shape),
    }


@pytest.mark.parametrize("role", ["q", "k"])
@pytest.mark.parametrize("name, size", SETTINGS)
def test_finite_values_and_gradients(name: str, size: int, role: str) -> None:
    for shake in (False, True):
        phi = build(name, size, role, shake=shake)
        for kind, x in extremes().items():
            x = x.clone().requires_grad_()
            out = phi(x, torch.arange(TOKENS)[None])
            out.sum().backward()
            assert bool(out.isfinite().all()), kind
            assert all(bool(tensor.grad.isfinite().all()) for tensor in (x, *phi.parameters())), kind
            phi.zero_grad()


@pytest.mark.parametrize("name, size", [s for s in SETTINGS if s[0] in LEARNED])
def test_learned_parameters_learn_from_the_start(name: str, size: int) -> None:
    phi = build(name, size, shake=False)
    (phi(*inputs()) * torch.randn(HEADS, TOKENS, phi.width)).sum().backward()
    assert all(bool((tensor.grad != 0).flatten(1).any(1).all()) for tensor in phi.parameters())


@pytest.mark.parametrize("role", ["q", "k"])
@pytest.mark.parametrize("name, size", SETTINGS)
def test_heads_do_not_mix(name: str, size: int, role: str) -> None:
    phi, (x, position) = build(name, size, role), inputs()
    before = phi(x.clone(), position)
    x[:, 1] += 1
    for tensor in phi.state_dict().values():
        tensor[1] += 0.5
    after = phi(x, position)
    assert torch.equal(before[:, [0, 2]], after[:, [0, 2]])
    assert not torch.equal(before[:, 1], after[:, 1])


@pytest.mark.parametrize("role", ["q", "k"])
@pytest.mark.parametrize("name, size", SETTINGS)
def test_token_by_token(name: str, size: int, role: str) -> None:
    phi, (x, position) = build(name, size, role), inputs(torch.float64)
    steps = [phi(x[:, :, t : t + 1], position[:, t : t + 1]) for t in range(TOKENS)]
    torch.testing.assert_close(torch.cat(steps, dim=2), phi(x, position), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("role", ["q", "k"])
@pytest.mark.parametrize("name, size", SETTINGS)
@torch.no_grad()
def test_fp32_is_close_to_fp64(name: str, size: int, role: str) -> None:
    for scale in (0.1, 1.0, 6.0):
        phi, (x, position) = build(name, size, role), inputs(torch.float64, scale)
        exact = phi(x, position)
        rough = phi(x.float(), position).double()
        assert float((rough - exact).norm() / exact.norm()) < 1e-4


@pytest.mark.parametrize("name, size", SETTINGS)
def test_state_dict_round_trip(name: str, size: int) -> None:
    phi, (x, position) = build(name, size), inputs()
    with torch.device("meta"):
        other = FEATURE_MAPS[name](HEADS, DIM, spec_of(name, size), "k")
    assert all(tensor.is_meta for tensor in other.state_dict().values())
    other.load_state_dict(phi.state_dict(), assign=True)
    assert torch.equal(other(x, position), phi(x, position))


def test_parameters_are_fp32_whatever_the_default() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        states = [build(name, size, shake=False).state_dict() for name, size in SETTINGS]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(tensor.dtype == torch.float32 for state in states for tensor in state.values())


def test_maps_without_parameters() -> None:
    x = vectors("identity")[0]
    numbers = x.tolist()
    length = math.sqrt(sum(v * v for v in numbers))
    total = sum(math.exp(v) for v in numbers)
    expected = {
        "identity": numbers,
        "l2norm": [v / length for v in numbers],
        "unit": [v / math.sqrt(length**2 + 1e-6) for v in numbers],
        "elu1": [v + 1 if v > 0 else math.exp(v) for v in numbers],
        "relu": [max(v, 0.0) for v in numbers],
        "softmax": [math.exp(v) / total for v in numbers],
    }
    for name, values in expected.items():
        out = build(name)(x.expand(1, HEADS, 1, DIM))[0, 0, 0]
        torch.testing.assert_close(out, torch.tensor(values, dtype=x.dtype))


@pytest.mark.parametrize("size", [0, 5])
@pytest.mark.parametrize("name", ["hedgehog", "hedgehog_joint", "hedgehog_exp"])
def test_hedgehog(name: str, size: int) -> None:
    _, x, _, out, _, phi = vectors(name, size)
    y = applied(phi.weight, x).tolist()
    plus, minus = [math.exp(v) for v in y], [math.exp(-v) for v in y]
    both = sum(plus) + sum(minus)
    totals = {"hedgehog": (sum(plus), sum(minus)), "hedgehog_joint": (both, both), "hedgehog_exp": (1.0, 1.0)}[name]
    expected = [v / totals[0] for v in plus] + [v / totals[1] for v in minus]
    torch.testing.assert_close(out, torch.tensor(expected, dtype=x.dtype))
    start = build(name, size, shake=False).weight
    assert torch.equal(start, torch.eye(DIM, size or DIM).expand(HEADS, -1, -1))


def test_hedgehog_exp_is_cut() -> None:
    out = build("hedgehog_exp", shake=False)(torch.full((1, HEADS, 1, DIM), 60.0))
    torch.testing.assert_close(out[0, 0, 0, [0, DIM]], torch.tensor([30.0, -30.0]).exp())


@pytest.mark.parametrize("size", [0, 5, 12])
def test_t2r(size: int) -> None:
    _, x, _, out, _, phi = vectors("t2r", size)
    torch.testing.assert_close(out, (applied(phi.weight, x) + phi.bias[0].double()).clamp(min=0))
    start = build("t2r", size, shake=False)(x.expand(1, HEADS, 1, DIM))[0, 0, 0]
    torch.testing.assert_close(start, (torch.cat([x, -x])[: size or DIM] + float(torch.tensor(0.1))).clamp(min=0))


@pytest.mark.parametrize("size", [0, 5, 12])
def test_feedforward(size: int) -> None:
    _, x, _, out, _, phi = vectors("feedforward", size)
    h = applied(phi.hidden, x) * 2 / (1 + (-applied(phi.hidden_gate, x)).exp())
    torch.testing.assert_close(out, (1 + applied(phi.weight, h).exp()).log() * 2 / (1 + (-applied(phi.gate, h)).exp()))
    start = build("feedforward", size, shake=False)(x.expand(1, HEADS, 1, DIM))[0, 0, 0]
    torch.testing.assert_close(start, (1 + torch.cat([x, -x])[: size or DIM].exp()).log())


@pytest.mark.parametrize("size", [0, 5, 12])
def test_taylor(size: int) -> None:
    q, k, phi_q, phi_k, map_q, map_k = vectors("taylor", size)
    s = float(applied(map_q.weight, q) @ applied(map_k.weight, k)) / math.sqrt(size or DIM)
    assert float(phi_q @ phi_k) == pytest.approx(1 + s + s * s / 2, rel=1e-9)


@pytest.mark.parametrize("size", [0, 5, 12])
def test_rebased(size: int) -> None:
    q, k, phi_q, phi_k, map_q, map_k = vectors("rebased", size)

    def affine(x: Tensor, phi: FeatureMap) -> Tensor:
        y = applied(phi.weight, x)
        y = y - y.mean()
        return y / (y.square().mean() + 1e-5).sqrt() * phi.gamma[0] + phi.beta[0]

    product = float(affine(q, map_q) @ affine(k, map_k))
    assert float(phi_q @ phi_k) == pytest.approx(product**2 / (size or DIM), rel=1e-9)


def test_cosformer() -> None:
    phi, x = build("cosformer"), torch.randn(2, HEADS, 2, DIM, dtype=torch.float64)
    position = torch.tensor([[3, 50], [0, 63]])
    out = phi(x, position)
    for b, (i, j) in enumerate(position.tolist()):
        expected = x[b, 0, 0].clamp(min=0) @ x[b, 0, 1].clamp(min=0) * math.cos(math.pi / 2 * (i - j) / LENGTH)
        assert float(out[b, 0, 0] @ out[b, 0, 1]) == pytest.approx(float(expected), rel=1e-9)


def test_cosformer_refuses_a_longer_text() -> None:
    phi, x = build("cosformer"), torch.zeros(1, HEADS, 1, DIM)
    phi(x, torch.tensor([[LENGTH - 1]]))
    with pytest.raises(ValueError, match="a text of more than 64 tokens: cosformer was built for max_length=64"):
        phi(x, torch.tensor([[LENGTH]]))
    with pytest.raises(ValueError, match="position"):
        phi(x)


def test_performer_equation() -> None:
    _, x, _, out, _, phi = vectors("performer", 5)
    y = (x / DIM**0.25).tolist()
    w = phi.projection[0].tolist()
    dots = [sum(y[i] * w[i][j] for i in range(DIM)) for j in range(5)]
    half = sum(v * v for v in y) / 2
    expected = [math.exp(sign * dot - half) / math.sqrt(10) for sign in (1, -1) for dot in dots]
    torch.testing.assert_close(out, torch.tensor(expected, dtype=x.dtype))


def test_performer_approaches_the_exponential() -> None:
    q, k, phi_q, phi_k, *_ = vectors("performer", 8192, scale=0.7)
    assert float(phi_q @ phi_k) == pytest.approx(math.exp(float(q @ k) / math.sqrt(DIM)), rel=0.05)


def test_performer_directions() -> None:
    torch.manual_seed(1)
    q = build("performer", 12, "q").projection
    torch.manual_seed(2)
    k = build("performer", 12, "k").projection
    assert torch.equal(q, k)
    assert not torch.equal(q[0], q[1])
    for block in (q[0, :, :DIM], q[0, :, DIM:]):
        gram = block.T @ block
        torch.testing.assert_close(gram, gram.diagonal().diag(), atol=1e-5, rtol=0)
    lengths = build("performer", 4096).projection[0].square().sum(0)
    assert float(lengths.mean()) == pytest.approx(DIM, rel=0.05)
    assert float(lengths.var()) == pytest.approx(2 * DIM, rel=0.15)


def test_performer_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    build("performer", shake=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_performer_heads_that_share_a_memory_share_directions() -> None:
    spec = spec_of("performer", share_kv=True)
    q, k = FEATURE_MAPS["performer"](4, DIM, spec, "q"), FEATURE_MAPS["performer"](2, DIM, spec, "k")
    assert torch.equal(q.projection, k.projection.repeat_interleave(2, dim=0))


def test_lln() -> None:
    _, x, _, out, _, phi = vectors("lln")
    torch.testing.assert_close(out, torch.tensor([math.exp(float(phi.scale[0]) * v) for v in x.tolist()], dtype=x.dtype))
    assert torch.equal(build("lln", shake=False).scale, torch.ones(HEADS))
    assert not list(phi.parameters())


def test_nala() -> None:
    q, k, phi_q, phi_k, *_ = vectors("nala")
    length = math.sqrt(sum(v * v for v in q.tolist()))
    power = 3 * (0.5 + math.tanh(length))
    parts = [max(sign * v / length, 1e-6) ** power for sign in (1, -1) for v in q.tolist()]
    torch.testing.assert_close(phi_q, torch.tensor(parts, dtype=q.dtype))
    cubes = [max(sign * v, 0.0) ** 3 for sign in (1, -1) for v in k.tolist()]
    torch.testing.assert_close(phi_k, torch.tensor(cubes, dtype=k.dtype))


def test_focused() -> None:
    _, x, _, out, *_ = vectors("focused")
    y = [max(v, 0.0) + 1e-6 for v in x.tolist()]
    ratio = math.sqrt(sum(v * v for v in y) / sum(v**6 for v in y))
    torch.testing.assert_close(out, torch.tensor([ratio * v**3 for v in y], dtype=x.dtype))


def test_focused_gradient_passes_by_the_largest_channel() -> None:
    phi, x = build("focused"), torch.randn(1, HEADS, 2, DIM, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(phi, (x,))
