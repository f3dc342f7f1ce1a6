"""From units to their mixture: every bank and every exchange equal the way through rows, and when that way is taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moestro.core.errors import UserError
from moestro.core.plan import AnyPlan, Dense, Plan
from moestro.core.rows import Rows
from moestro.dispatch import examples as exchanges
from moestro.dispatch.base import mixture
from moestro.experts import MLP, Experts, Gated, examples
from moestro.experts import gated as gated_file
from moestro.experts.gated import GatedBank
from moestro.ops.combine import through
from moestro.ops.expert_mlp import FEW, choose
from moestro.ops.expert_mlp.problem import Spec
from moestro.testing.compare import assert_close
from moestro.testing.experts import plan_for

D, E, T = 16, 4, 24


def plans() -> dict[str, AnyPlan]:
    plan = plan_for(T, E, 2)
    kept = torch.arange(2 * T).view(T, 2) % 3 > 0
    valid = torch.arange(T) % 4 > 0
    lost = torch.where(kept & valid[:, None], plan.weight, 0.0)
    return {
        "plain": dataclasses.replace(plan, capacity=T),
        "starved": dataclasses.replace(plan_for(T, E, 2, starved=(1,)), capacity=T),
        "dropped and padded": dataclasses.replace(
            plan, kept=kept, valid=valid, weight=lost, complete=False, capacity=T
        ),
        "dense": Dense(weight=torch.rand(T, E, generator=torch.Generator().manual_seed(0))),
    }


def results(run: Any, bank: nn.Module, plan: AnyPlan, **rest: Any) -> dict[str, Tensor]:
    bank.zero_grad()
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weight = plan.weight.clone().requires_grad_()
    y = run(x, dataclasses.replace(plan, weight=weight), **rest)
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    grads = {n: p.grad for n, p in bank.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, "weight": weight.grad, **grads}


@pytest.mark.parametrize("plan", plans())
@pytest.mark.parametrize("name", examples())
def test_banks(name: str, plan: str) -> None:
    torch.manual_seed(0)
    bank = examples()[name].build(dim=D, num_experts=E)
    want = results(lambda x, p: through(bank, x, p), bank, plans()[plan])
    got = results(bank.mixture, bank, plans()[plan])
    assert set(got) == set(want)
    for n, value in want.items():
        assert_close(n, got[n], value, 1e-5)


@pytest.mark.parametrize("name", exchanges())
@pytest.mark.parametrize("plan", plans())
def test_exchanges(name: str, plan: str) -> None:
    torch.manual_seed(0)
    bank = Gated(width=7).build(dim=D, num_experts=E)
    exchange = exchanges()[name].build(bank)
    want = results(lambda x, p: through(bank, x, p), bank, plans()[plan])
    got = results(lambda x, p: mixture(exchange, x, p), bank, plans()[plan])
    for n, value in want.items():
        assert_close(n, got[n], value, 1e-5)


@pytest.mark.parametrize("name", examples())
def test_substituted_weights(name: str) -> None:
    bank, other = (examples()[name].build(dim=D, num_experts=E) for _ in range(2))
    own = {n: p.detach().clone() for n, p in bank.named_parameters()}
    x, plan = torch.randn(T, D), plan_for(T, E, 2)
    for units, choices in ((x, plan), (x[:2], plan_for(2, E, 2))):  # the second is few
        with torch.no_grad():
            want = bank.mixture(units, choices)
            assert_close("y", other.mixture(units, choices, weights=own), want, 1e-6)


@pytest.mark.parametrize("config", [Gated(width=9, deterministic=True), MLP(width=9, bias=True, deterministic=True)])
def test_deterministic_banks(config: Experts) -> None:
    """A unit comes out bitwise equal alone and in a batch, or one line says that nothing here promises it."""
    bank = config.build(dim=D, num_experts=E)
    x, plan = torch.randn(T, D), plan_for(T, E, 2)
    spec = Spec(device="cpu", dtype=torch.float32, rows=2, dim=D, width=9, experts=E, deterministic=True)
    with torch.no_grad():
        if not any(b.supported(spec)[0] for b in choose.BACKENDS):
            with pytest.raises(UserError, match=r"^deterministic=True: nothing here promises it[^\n]*$"):
                bank.mixture(x, plan)
            return
        whole = bank.mixture(x, plan)
        for t in range(T):
            alone = dataclasses.replace(plan, expert=plan.expert[t : t + 1], weight=plan.weight[t : t + 1])
            assert torch.equal(bank.mixture(x[t : t + 1], alone), whole[t : t + 1])


class Calls:
    """Notes which function of the file of the gated bank was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        for name in ("gated_few", "gated_mixture", "gated_mlp"):
            monkeypatch.setattr(gated_file, name, self.noting(name, getattr(gated_file, name)))

    def noting(self, name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            self.names.append(name)
            return function(*args, **kwargs)

        return call

    def of(self, run: Any) -> str:
        self.names.clear()
        run()
        assert len(self.names) == 1
        return self.names[0]


def test_few_units_without_a_gradient_are_read_from_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    bank = Gated(width=8).build(dim=D, num_experts=E)
    few, many = plan_for(FEW // 2, E, 2), plan_for(FEW // 2 + 1, E, 2)
    x = torch.randn(FEW // 2 + 1, D)
    assert calls.of(lambda: bank.mixture(x[:-1], few)) == "gated_mixture"  # the parameters want a gradient
    with torch.no_grad():
        assert calls.of(lambda: bank.mixture(x[:-1], few)) == "gated_few"
        assert calls.of(lambda: bank.mixture(x, many)) == "gated_mixture"
        assert calls.of(lambda: bank.mixture(x[:2], Dense(weight=torch.rand(2, E)))) == "gated_mixture"
        widths = Gated(width=(8, 4, 2, 1)).build(dim=D, num_experts=E)
        assert calls.of(lambda: widths.mixture(x[:-1], few)) == "gated_mixture"
    frozen = bank.requires_grad_(False)
    assert calls.of(lambda: frozen.mixture(x[:-1], few)) == "gated_few"
    assert calls.of(lambda: frozen.mixture(x[:-1].clone().requires_grad_(), few)) == "gated_mixture"


def test_few_units_with_dropped_padded_and_virtual_choices() -> None:
    bank = Gated(width=8).build(dim=D, num_experts=E)
    expert = torch.tensor([[0, E], [3, -1], [2, 1], [1, 0]])
    kept, valid = expert != 2, torch.tensor([True, True, True, False])
    weight = torch.where(kept & valid[:, None] & (expert >= 0), 0.5, 0.0)
    plan = Plan(expert=expert, weight=weight, num_experts=E, kept=kept, valid=valid, virtual=("null",)).check()
    x = torch.randn(4, D)
    x[3] = float("nan")  # padding is not even read
    with torch.no_grad():
        y = bank.mixture(x, plan)
        assert_close("y", y, through(bank, x, plan), 1e-6)
    assert not y[3].any()


def test_a_module_that_was_changed_from_outside_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks of sharding and offloading, and a replaced forward, are not passed by."""
    calls = Calls(monkeypatch)
    plan, x = plan_for(T, E, 2), torch.randn(T, D)
    bank = Gated(width=8).build(dim=D, num_experts=E)
    assert calls.of(lambda: mixture(bank, x, plan)) == "gated_mixture"
    want = mixture(bank, x, plan)
    seen: list[Any] = []
    hook = bank.register_forward_pre_hook(lambda module, args: seen.append(args))
    assert calls.of(lambda: mixture(bank, x, plan)) == "gated_mlp"
    assert len(seen) == 1
    hook.remove()
    assert calls.of(lambda: mixture(bank, x, plan)) == "gated_mixture"
    forward = bank.forward
    bank.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)
    assert_close("y", mixture(bank, x, plan), 2 * want, 1e-6)


def test_a_bank_that_changes_forward_alone_is_called() -> None:
    class Doubled(GatedBank):
        def forward(
            self, rows: Tensor, index: Rows, context: Any = None, weights: Mapping[str, Tensor] | None = None
        ) -> Tensor:
            return 2 * super().forward(rows, index, context, weights)

    class Renamed(Doubled):
        pass

    torch.manual_seed(0)
    bank = Gated(width=8).build(dim=D, num_experts=E)
    plan, x = plan_for(T, E, 2), torch.randn(T, D)
    for kind in (Doubled, Renamed):
        other = kind(Gated(width=8), D, E)
        other.load_state_dict(bank.state_dict())
        assert_close("y", mixture(other, x, plan), 2 * mixture(bank, x, plan), 1e-6)
