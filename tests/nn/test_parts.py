"""Norm, dense MLP, initial values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from moestro.core.errors import UserError
from moestro.core.params import ParamInfo, describe
from moestro.models.examples import examples
from moestro.nn import Attention, FeedForward, LayerNorm, RMSNorm
from moestro.nn.init import initialise
from moestro.ops.expert_mlp.naive import gated_mlp
from moestro.testing.compare import assert_close


def test_norm_by_its_formula() -> None:
    norm = RMSNorm(eps=0.1).build(7).double()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(7))
    x = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    want = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * norm.weight
    assert_close("y", norm(x), want, 1e-12)
    assert torch.autograd.gradcheck(norm, (x,))


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_norm_computes_in_fp32(weights: torch.dtype) -> None:
    norm = RMSNorm().build(512).to(weights)
    x = (300 * torch.randn(4, 512)).to(torch.bfloat16)
    want = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    got = norm(x)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want.to(torch.float32).to(torch.bfloat16)), "only the result is rounded"
    half = torch.full((1, 512), 300.0, dtype=torch.float16)
    assert_close("no overflow of squares in fp16", norm(half), torch.ones(1, 512, dtype=torch.float16), 1e-3)


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_by_its_formula(bias: bool) -> None:
    norm = LayerNorm(eps=0.1, bias=bias).build(7).double()
    with torch.no_grad():
        for p in norm.parameters():
            p.copy_(torch.randn(7))
    x = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    away = x - x.mean(-1, keepdim=True)
    want = away / (away.square().mean(-1, keepdim=True) + 0.1).sqrt() * norm.weight + (norm.bias if bias else 0)
    assert_close("y", norm(x), want, 1e-12)
    assert torch.autograd.gradcheck(norm, (x,))
    low = LayerNorm().build(512).to(torch.bfloat16)
    rows = (300 * torch.randn(4, 512)).to(torch.bfloat16)
    got, exact = low(rows), torch.nn.functional.layer_norm(rows.float(), (512,))
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, exact.to(torch.bfloat16)), "only the result is rounded"
    info = describe(LayerNorm().build(4))
    assert info["weight"].ones
    assert (info["bias"].role, info["bias"].init_std, info["bias"].decay) == ("norm", 0.0, False)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_dense_mlp_is_one_gated_expert(activation: str) -> None:
    ffn = FeedForward(width=10, activation=activation).build(6).double()  # type: ignore[arg-type]
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    y, carry, trail = ffn(x)
    want = gated_mlp(x.view(8, 6), ffn.gate_up[None], ffn.down[None], torch.tensor([0, 8]), activation)
    assert_close("y", y, want.view(2, 4, 6), 1e-9)
    assert not trail
    assert not carry.own


class Pair(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mixer = Attention(num_heads=2, bias="all", qk_norm="head").build(8)
        self.ffn = FeedForward(width=width).build(8)


def test_equal_names_get_equal_values() -> None:
    torch.manual_seed(1)
    a, b = Pair(4), Pair(12)
    initialise(a, seed=5)
    torch.manual_seed(2)
    initialise(b, seed=5)
    mine, other = dict(a.named_parameters()), dict(b.named_parameters())
    for name, value in mine.items():
        if value.shape == other[name].shape:
            assert torch.equal(value, other[name]), name
    initialise(b, seed=6)
    assert not torch.equal(mine["mixer.q.weight"], other["mixer.q.weight"])
    assert not torch.equal(mine["mixer.q.weight"], mine["mixer.k.weight"]), "names differ, so do values"


def test_values_follow_the_metadata() -> None:
    model = Pair(300)
    initialise(model, seed=0, std=0.02, residual_branches=8)
    p = dict(model.named_parameters())
    assert torch.equal(p["mixer.q_norm.weight"], torch.ones(4))
    assert not p["mixer.q.bias"].any()
    assert not p["mixer.o.bias"].any()
    assert float(p["ffn.gate_up"].detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(p["ffn.down"].detach().std()) == pytest.approx(0.02 / math.sqrt(8), rel=0.05)
    plain = Pair(300)
    initialise(plain, seed=0)
    got = p["ffn.down"] * math.sqrt(8)
    assert_close("the scale is all that differs", got, dict(plain.named_parameters())["ffn.down"])
    assert_close("of the output projection too", p["mixer.o.weight"] * math.sqrt(8), plain.mixer.o.weight)


def test_declared_values_and_constants() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.zero = nn.Parameter(torch.randn(3, 3))
            self.wide = nn.Parameter(torch.randn(100, 100))
            self.temperature = nn.Parameter(torch.tensor([0.07]))

        def param_info(self) -> dict[str, ParamInfo]:
            return {
                "zero": ParamInfo(role="other", matrix_axes=(0, 1), init_std=0.0),
                "wide": ParamInfo(role="other", matrix_axes=(0, 1), init_std=2.0),
            }

    model = Odd()
    initialise(model)
    assert not model.zero.any()
    assert float(model.wide.detach().std()) == pytest.approx(2.0, rel=0.05)
    assert float(model.temperature.detach()) == pytest.approx(0.07)


def test_the_dtype_does_not_change_the_draw() -> None:
    a, b = Pair(4), Pair(4).to(torch.bfloat16)
    initialise(a)
    initialise(b)
    assert torch.equal(a.ffn.gate_up.to(torch.bfloat16), b.ffn.gate_up)


def test_no_values_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Pair(4)
    with pytest.raises(UserError, match=r"mixer.q.weight is on the meta device"):
        initialise(model)


def test_roles() -> None:
    infos = describe(Pair(4))
    assert {infos[n].role for n in infos if n.startswith("ffn")} == {"dense"}
    assert infos["mixer.q.weight"].role == "attention"
    assert infos["mixer.q_norm.weight"].role == "norm"
    assert not infos["mixer.q_norm.weight"].decay
    assert not infos["mixer.q.bias"].decay
    assert infos["ffn.gate_up"].parts == ("gate", "up")


def test_initial_values_by_the_number_of_inputs():
    model = examples()["moe"].replace(init_std=None, dim=64, init_depth_scaled=False).build()
    layer = model.layers[0]
    for parameter, want in (
        (model.embed.weight, 1.0),
        (model.head.weight, 64**-0.5),
        (layer.ffn.router.score.weight, 64**-0.5),
        (layer.ffn.experts.gate_up, 64**-0.5),
        (layer.ffn.experts.down, 12**-0.5),
    ):
        four_sigma = 4 / math.sqrt(2 * parameter.numel())
        assert float(parameter.detach().std()) == pytest.approx(want, rel=four_sigma)
