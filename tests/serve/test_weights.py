"""Models with packed weights: bytes by kind, what stays, and the same model that rounded fp32 weights give."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moestro.core.account import cost
from moestro.core.errors import UserError
from moestro.experts import Gated
from moestro.experts.packed import PackedBank
from moestro.moe import MoELayer
from moestro.nn.packed import PackedFeedForward, PackedLinear
from moestro.ops.packed import KINDS, Kind, bytes_of, pack, unpack
from moestro.serve.generate import generate
from moestro.serve.weights import bytes_by_kind, pack_model
from moestro.testing.compare import assert_close
from moestro.train.presets import preset


def model_of(**changes: Any) -> nn.Module:
    config = preset("tiny").model.replace(vocab_size=64, **changes)
    return config.build().eval()


def rounded(model: nn.Module, kind: Kind, paths: tuple[str, ...]) -> nn.Module:
    """The fp32 model with the numbers that the packed weights stand for."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if p.ndim >= 2 and any(name.startswith(f"{path}.") for path in paths):
                p.copy_(unpack(pack(p, kind)))
    return made


def tokens() -> Tensor:
    return torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_model_is_that_of_the_rounded_weights(kind: Kind, tied: bool) -> None:
    model = model_of(tied=tied)
    with torch.no_grad():
        packed = copy.deepcopy(model)
        packing = pack_model(packed, kind)
        want = rounded(model, kind, packing.packed)
        assert_close("logits", packed(tokens())[0], want(tokens())[0], 1e-4)
        targets = torch.roll(tokens(), -1, 1)
        assert_close("loss", packed.loss(tokens(), targets)[0], want.loss(tokens(), targets)[0], 1e-5)  # type: ignore[operator]
    assert ("head" in packing.packed) is not tied
    made = generate(packed, [1, 2, 3], 8)
    assert made.tokens.tolist() == generate(want, [1, 2, 3], 8).tokens.tolist()


@pytest.mark.parametrize("kind", list(KINDS))
def test_bytes_by_kind(kind: Kind) -> None:
    model = model_of(tied=False)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    packing = pack_model(model, kind)
    assert sum(packing.before.values()) == held
    experts = [s for n, s in shapes.items() if ".experts." in n]
    assert packing.before["expert"] == 4 * sum(torch.Size(s).numel() for s in experts)
    assert packing.after["expert"] == sum(bytes_of(kind, s) for s in experts)
    assert packing.after["head"] == bytes_of(kind, shapes["head.weight"])
    for stays in ("router", "norm", "embedding"):
        assert packing.after[stays] == packing.before[stays]
    assert packing.after == bytes_by_kind(model)
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert sum(packing.after.values()) == held


def test_what_is_packed() -> None:
    model = model_of(tied=False)
    before = cost(model, 8)
    packing = pack_model(model, "int8")
    kinds = {path: type(model.get_submodule(path)) for path in packing.packed}
    assert set(kinds.values()) <= {PackedBank, PackedLinear, PackedFeedForward}
    assert kinds["head"] is PackedLinear
    assert PackedBank in kinds.values()
    assert not any("router" in path for path in kinds)
    assert packing.kept == {}
    assert cost(model, 8) == before
    with pytest.raises(UserError, match="nothing to pack"):
        pack_model(model, "int8")


def test_saved_and_loaded() -> None:
    saved, other = model_of(seed=1), model_of(seed=2)
    pack_model(saved, "int4")
    fp32 = other.state_dict()
    pack_model(other, "int4")
    other.load_state_dict(saved.state_dict())
    with torch.no_grad():
        assert torch.equal(other(tokens())[0], saved(tokens())[0])
    with pytest.raises(RuntimeError, match="key"):
        other.load_state_dict(fp32)


def test_what_cannot_be_packed_is_named() -> None:
    def layer() -> nn.Module:
        return MoELayer(num_experts=2, experts=Gated(width=(8, 16))).build(dim=16)

    made = nn.Sequential(layer())
    with pytest.raises(UserError, match=r"0\.experts: its experts have unequal widths"):
        pack_model(made, "int8")
    both = nn.Sequential(layer(), MoELayer(num_experts=2, experts=Gated(width=8)).build(dim=16))
    packing = pack_model(both, "int8")
    assert packing.kept == {"0.experts": "its experts have unequal widths"}
    assert packing.packed == ("1.experts",)
    with torch.no_grad():
        both[1].experts.down_data.zero_()
    broken = MoELayer(num_experts=2, experts=Gated(width=8)).build(dim=16)
    with torch.no_grad():
        broken.experts.down[0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="0.experts: a weight that is not finite"):
        pack_model(nn.Sequential(broken), "int8")
    with pytest.raises(UserError, match="unknown kind of weights 'int2'"):
        pack_model(both, "int2")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("bias", [True, False])
def test_packed_linear(kind: Kind, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(33, 7, bias=bias).requires_grad_(False)
    packed = PackedLinear(linear, kind)
    x = torch.randn(2, 3, 33)
    linear.weight.copy_(unpack(pack(linear.weight, kind)))
    assert torch.equal(packed.weight, linear.weight)
    assert_close("y", packed(x), linear(x), 1e-6)
    state = {n: b.clone() for n, b in packed.named_buffers()}
    packed.to(torch.float64)
    assert all(torch.equal(b, state[n]) and b.dtype == state[n].dtype for n, b in packed.named_buffers())
    with pytest.raises(RuntimeError, match="weights of another kind"):
        packed.load_state_dict({n: b.double() for n, b in state.items()})
