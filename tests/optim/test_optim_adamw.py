"""Groups by role, state as named tensors, the gradient norm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moestro.core.errors import UserError
from moestro.core.params import ParamInfo
from moestro.optim import AdamW
from moestro.optim.adamw import group
from moestro.optim.clip import clip, grad_norm
from moestro.optim.hooks import RouterSteps


class Bank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 4, 5))
        self.up_bias = nn.Parameter(torch.randn(3, 4))

    def param_info(self) -> dict[str, ParamInfo]:
        return {
            "up": ParamInfo(role="expert", expert_axis=0, matrix_axes=(1, 2)),
            "up_bias": ParamInfo(role="expert", expert_axis=0, decay=False),
        }


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 5)
        self.bank = Bank()

    def forward(self, x):
        h = self.first(x)
        return sum(h @ w.t() + b for w, b in zip(self.bank.up.unbind(0), self.bank.up_bias.unbind(0)))


def trained(optimizer, model, steps, start=0):
    for step in range(start, steps):
        x = torch.randn(7, 5, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step(1.0 / (1 + step))
        optimizer.clear()


def test_groups_by_role_and_decay():
    groups = group(AdamW(weight_decay=0.1, lr_expert=0.5), Net())
    found = {(g.lr, g.decay): set(g.names) for g in groups}
    assert found == {
        (1.0, 0.1): {"first.weight"},
        (1.0, 0.0): {"first.bias"},
        (0.5, 0.1): {"bank.up"},
        (0.5, 0.0): {"bank.up_bias"},
    }


def test_a_frozen_parameter_is_in_no_group():
    model = Net()
    model.bank.requires_grad_(False)
    assert {n for g in group(AdamW(), model) for n in g.names} == {"first.weight", "first.bias"}


def test_equals_torch_with_a_factor_per_role():
    model, other = Net(), Net()
    ours = AdamW(lr=0.01, lr_expert=0.5, weight_decay=0.1).build(model)
    theirs = torch.optim.AdamW(
        [
            {"params": [other.first.weight], "lr": 0.01, "weight_decay": 0.1},
            {"params": [other.first.bias], "lr": 0.01, "weight_decay": 0.0},
            {"params": [other.bank.up], "lr": 0.005, "weight_decay": 0.1},
            {"params": [other.bank.up_bias], "lr": 0.005, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        foreach=False,
    )
    for step in range(5):
        for m in (model, other):
            m(torch.randn(7, 5, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        ours.step(1.0)
        ours.clear()
        theirs.step()
        theirs.zero_grad()
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_state_goes_on_to_the_last_bit():
    whole, half = Net(), Net()
    a = AdamW().build(whole)
    trained(a, whole, 6)
    b = AdamW().build(half)
    trained(b, half, 3)
    resumed = Net()
    resumed.load_state_dict(half.state_dict())
    c = AdamW().build(resumed)
    c.load({name: t.clone() for name, t in b.to_tensors().items()})
    trained(c, resumed, 6, start=3)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters()))
    forgetful = Net()
    forgetful.load_state_dict(half.state_dict())
    trained(AdamW().build(forgetful), forgetful, 6, start=3)
    assert not all(torch.equal(p, q) for p, q in zip(whole.parameters(), forgetful.parameters()))


def test_a_foreign_state_is_refused():
    model = Net()
    optimizer = AdamW().build(model)
    trained(optimizer, model, 1)
    state = optimizer.to_tensors()
    with pytest.raises(UserError, match="fits no parameter"):
        optimizer.load(state | {"other.weight/exp_avg": torch.zeros(1)})
    with pytest.raises(UserError, match="incomplete"):
        optimizer.load({n: t for n, t in state.items() if n != "bank.up/exp_avg_sq"})
    with pytest.raises(UserError, match="shape"):
        optimizer.load(state | {"bank.up/exp_avg": torch.zeros(1)})


def test_the_norm_does_not_know_the_grouping():
    stack = torch.randn(6, 10, 20, generator=torch.Generator().manual_seed(1))
    want = stack.double().norm()
    for grads in ([stack], list(stack.unbind(0)), [stack[:2], stack[2:].reshape(-1)]):
        assert float(grad_norm(grads)) == pytest.approx(float(want), rel=1e-6)
    assert float(grad_norm([])) == 0.0


def test_clipping_scales_to_the_limit_and_only_down():
    grads = [torch.full((4,), 3.0), torch.full((2, 2), 4.0)]
    norm = float(grad_norm(grads))
    assert norm == pytest.approx(10.0)
    assert clip(grads, norm, 20.0) == 1.0
    assert clip(grads, norm, 0.0) == 1.0
    assert clip(grads, norm, 5.0) == pytest.approx(0.5)
    assert float(grad_norm(grads)) == pytest.approx(5.0)


def test_routers_step_with_the_counts_of_their_layer():
    class Router(nn.Module):
        def step(self, counts):
            self.seen = counts

    model = nn.ModuleDict({"a": nn.Module(), "b": nn.Module()})
    model["a"].router, model["b"].router = Router(), nn.Linear(2, 2)
    counts = {"a": torch.tensor([1, 2]), "b": torch.tensor([3, 4])}
    RouterSteps(model)(0, counts)
    assert model["a"].router.seen is counts["a"]
