"""Blocks in series and whole models, against loops over units."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moestro.core.carry import Carry, Live
from moestro.core.errors import UserError
from moestro.core.plan import AnyPlan, Dense, Plan
from moestro.core.signals import Signals
from moestro.core.trail import Key
from moestro.experts import Gated
from moestro.losses.config import SwitchBalance
from moestro.moe import MoELayer, Serial, Whole
from moestro.routers import config as routers
from moestro.testing.compare import assert_close

D, E, T, S, V = 8, 4, 6, 5, 7


class Mix(nn.Module):
    """A block on sequences [R, S, D]: tokens of one unit are mixed, units are not."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.map = nn.Linear(D, D)
        g = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.map.weight, std=0.4, generator=g)
        self.ran: list[int] = []

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.ran.append(x.shape[0])
        h = self.map(x).tanh() + x.mean(1, keepdim=True)
        return x + (h if context is None else h * context[:, None])


def serial(**changes: Any) -> Any:
    torch.manual_seed(0)
    made = Serial().replace(**changes).build([Mix(e) for e in range(E)], D)
    if isinstance(made.router.score, nn.Module):
        for p in made.router.score.parameters():
            nn.init.normal_(p, std=0.5)
    return made


def units(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(T, *shape, generator=torch.Generator().manual_seed(seed))


def table() -> Plan:
    expert = torch.tensor([[0, 2], [2, 1], [1, -1], [2, 0], [-1, -1], [0, 1]])
    weight = torch.tensor([[0.9, 0.4], [0.7, 0.3], [0.5, 0.0], [0.6, 0.2], [0.0, 0.0], [1.0, 0.8]])
    return Plan(expert=expert, weight=weight, num_experts=E)


def live(plan: AnyPlan) -> tuple[Tensor, Carry]:
    weight = plan.weight.detach().clone().requires_grad_()
    return weight, Carry(own={"": Live(dataclasses.replace(plan.check(), weight=weight))})


@pytest.mark.parametrize("residual", ["weighted", "straight_through"])
def test_serial_equals_a_loop_over_units(residual: str) -> None:
    part = serial(residual=residual)
    plan = table()
    weight, carry = live(plan)
    x = units(S, D).requires_grad_()
    y, _, trail = part(x, carry=carry)
    direction = units(S, D, seed=2)
    (y * direction).sum().backward()
    got = [x.grad, weight.grad, *(p.grad for b in part.blocks for p in b.parameters())]
    assert torch.equal(trail[""].demand, torch.tensor([3, 3, 3, 0]))

    exact = serial().double()
    x64 = x.detach().double().requires_grad_()
    w64 = weight.detach().double().requires_grad_()
    rows = []
    for t in range(T):
        h = x64[t : t + 1]
        for e, block in enumerate(exact.blocks):
            for k in range(2):
                if int(plan.expert[t, k]) == e:
                    w = w64[t, k] if residual == "weighted" else w64[t, k] / w64[t, k].detach()
                    h = h + w * (block(h) - h)
        rows.append(h)
    want_y = torch.cat(rows)
    (want_y * direction.double()).sum().backward()
    want = [x64.grad, w64.grad, *(p.grad for b in exact.blocks for p in b.parameters())]
    assert_close("y", y, want_y)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(f"gradient {i}", a, torch.zeros_like(a) if b is None else b)


def test_all_blocks_at_weight_one_are_the_plain_stack() -> None:
    part = serial()
    _, carry = live(Dense(weight=torch.ones(T, E)))
    want = units(S, D)
    y, _, _ = part(want, carry=carry)
    for block in part.blocks:
        want = block(want)
    assert_close("y", y, want, tol=1e-6)


def test_a_block_runs_on_those_who_chose_it() -> None:
    part = serial()
    _, carry = live(table())
    part(units(S, D), carry=carry)
    assert [b.ran for b in part.blocks] == [[3], [3], [3], []]


def test_the_router_of_a_series_learns_and_steps() -> None:
    part = serial(losses=(SwitchBalance(),), router=routers.Router(weigh=routers.Raw()))
    y, _, trail = part(units(S, D))
    (y.square().sum() + trail.loss()).backward()
    assert bool(part.router.score.weight.grad.any())
    assert all(p.grad is not None for p in part.parameters())
    assert part.expected_k() == 2
    assert part.causal
    part.step(trail.counts()[""])


def test_series_of_several_streams_with_a_context() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(D, D), nn.Linear(3, 3)

        def forward(self, x: dict[str, Tensor], context: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"image": self.a(x["image"]) * context["scale"][:, None], "text": self.b(x["text"]) + 1}

    torch.manual_seed(0)
    blocks = [Two(), Two()]
    part = Serial(router=routers.Router(weigh=routers.Raw(), select=routers.TopK(k=1))).build(blocks, 4)
    plan = Plan(expert=torch.tensor([[0], [1], [-1], [1], [0], [0]]), weight=torch.ones(T, 1), num_experts=2)
    plan = dataclasses.replace(plan, weight=(plan.expert >= 0).float())
    x, context = {"image": units(D), "text": units(3, seed=2)}, {"scale": units(1, seed=3)[:, 0]}
    y, _, _ = part(x, carry=live(plan)[1], router_input=units(4), context=context)
    for t in range(T):
        e = int(plan.expert[t])
        one = {n: v[t : t + 1] for n, v in x.items()}
        want = one if e < 0 else blocks[e](one, {"scale": context["scale"][t : t + 1]})
        for n, v in want.items():
            assert_close(f"{n} of unit {t}", y[n][t : t + 1], v, tol=1e-6)


def test_padding_in_a_series() -> None:
    part = serial()
    valid = torch.tensor([True, True, False, True, True, False])
    results = []
    for fill in (0.0, float("nan")):
        part.zero_grad()
        x = torch.where(valid[:, None, None], units(S, D), fill).requires_grad_()
        y, _, trail = part(x, Signals(valid=valid))
        assert not y[~valid].any()
        assert int(trail[""].demand.sum()) == 2 * 4
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad.clone() for p in part.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_series_that_nobody_chose() -> None:
    part = serial()
    plan = Plan(expert=torch.full((T, 1), -1), weight=torch.zeros(T, 1), num_experts=E)
    x = units(S, D).requires_grad_()
    y, _, _ = part(x, carry=live(plan)[1])
    assert torch.equal(y, x)
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for b in part.blocks for p in b.parameters())


def test_serial_refuses_what_it_cannot_do() -> None:
    copies = dataclasses.replace(table(), virtual=("copy",))
    with pytest.raises(UserError, match="real experts"):
        serial()(units(S, D), carry=live(copies)[1])
    with pytest.raises(UserError, match="about 6 units, x has 3"):
        serial()(units(S, D)[:3], carry=live(table())[1])
    with pytest.raises(UserError, match="need router_input"):
        serial()(units(2, 3, D))
    with pytest.raises(UserError, match="one T"):
        serial()((units(S, D), units(S, D)[:2]))


class Routed(nn.Module):
    """A block in the house's contract, with a routed layer inside."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = MoELayer(num_experts=3, experts=Gated(width=4)).build(D)

    def forward(self, x: Tensor) -> Any:
        y, carry, trail = self.ffn(x)
        return x + y, carry, trail.under("ffn")


def test_trails_from_inside_go_on() -> None:
    part = Serial(router=routers.Router(weigh=routers.Raw())).build([Routed(), Routed()], D)
    _, _, trail = part(units(S, D))
    assert set(trail) == {Key("", 0), Key("blocks.0.ffn", 0), Key("blocks.1.ffn", 0)}
    for maker in (None, routers.Router()):
        part = whole([Routed(), Routed()], router=maker)
        _, _, trail = part(units(S, D), router_input=units(D))
        assert set(trail) - {Key("", 0)} == {Key("models.0.ffn", 0), Key("models.1.ffn", 0)}


def test_a_block_that_returns_something_else_is_refused() -> None:
    part = Serial(router=routers.Router(weigh=routers.Raw())).build([nn.Linear(D, 3), nn.Linear(D, 3)], D)
    with pytest.raises(UserError, match="must return what it takes"):
        part(units(S, D))


# Whole models ------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Token ids [R, S] to logits [R, S, V], in the shape of answer that `kind` says."""

    def __init__(self, seed: int, kind: str = "tensor") -> None:
        super().__init__()
        self.table = nn.Embedding(10, V)
        nn.init.normal_(self.table.weight, generator=torch.Generator().manual_seed(seed))
        self.kind, self.ran = kind, []

    def forward(self, tokens: Tensor) -> Any:
        self.ran.append(tokens.shape[0])
        z = self.table(tokens)
        z = z + z.mean(1, keepdim=True)
        if self.kind == "tuple":
            return z, "rest"
        return type("Out", (), {"logits": z}) if self.kind == "object" else z


TOKENS = torch.randint(0, 10, (T, S), generator=torch.Generator().manual_seed(4))


def whole(models: list[nn.Module], **changes: Any) -> Any:
    return Whole().replace(**changes).build(models, D)


@pytest.mark.parametrize("space", ["logits", "probabilities"])
def test_a_model_averaged_with_itself_is_itself(space: str) -> None:
    y, _, trail = whole([Model(0), Model(0)], space=space)(TOKENS)
    assert_close("distribution", y.softmax(-1), Model(0)(TOKENS).softmax(-1), tol=1e-6)
    assert not trail


def test_means_of_logits_and_of_probabilities() -> None:
    models = [Model(0), Model(1, "tuple"), Model(2, "object")]
    p = torch.stack([Model(i)(TOKENS).double().softmax(-1) for i in range(3)])
    y, _, _ = whole(models)(TOKENS)
    geometric = p.log().mean(0).exp()
    assert_close("logits", y.softmax(-1), geometric / geometric.sum(-1, keepdim=True))
    y, _, _ = whole(models, space="probabilities")(TOKENS)
    assert_close("probabilities", y.exp(), p.mean(0))


def test_models_may_share_nothing_but_the_vocabulary() -> None:
    y, _, _ = whole([nn.Sequential(nn.Embedding(10, 3), nn.Linear(3, V)), Model(1)])(TOKENS)
    assert y.shape == (T, S, V)


@pytest.mark.parametrize("space", ["logits", "probabilities"])
def test_whole_models_with_a_router_equal_a_loop_over_units(space: str) -> None:
    part = whole([Model(e) for e in range(E)], space=space, router=routers.Router())
    plan = table()
    weight, carry = live(plan)
    y, _, trail = part(TOKENS, carry=carry, router_input=units(D))
    direction = units(S, V, seed=3)
    (y * direction).sum().backward()
    assert [m.ran for m in part.models] == [[3], [3], [3], []]
    assert torch.equal(trail[""].demand, torch.tensor([3, 3, 3, 0]))

    exact = [Model(e).double() for e in range(E)]
    w64 = weight.detach().double().requires_grad_()
    rows = []
    for t in range(T):
        total = torch.zeros(1, S, V, dtype=torch.float64)
        for k in range(2):
            e = int(plan.expert[t, k])
            if e >= 0:
                z = exact[e](TOKENS[t : t + 1])
                total = total + w64[t, k] * (z if space == "logits" else z.softmax(-1))
        chose = bool((plan.expert[t] >= 0).any())
        rows.append(total.log() if space == "probabilities" and chose else total)
    want = torch.cat(rows)
    (want * direction.double()).sum().backward()
    assert_close("y", y, want)
    assert w64.grad is not None
    assert_close("weight.grad", weight.grad, torch.where(plan.expert >= 0, w64.grad, 0.0))
    for e, model in enumerate(part.models):
        grad = exact[e].table.weight.grad
        have = model.table.weight.grad
        assert_close(f"model {e}", have, torch.zeros_like(have) if grad is None else grad)


def test_the_router_of_whole_models_learns() -> None:
    part = whole([Model(e) for e in range(E)], router=routers.Router(), losses=(SwitchBalance(),))
    y, _, trail = part(TOKENS, router_input=units(D))
    (y.square().mean() + trail.loss()).backward()
    assert bool(part.router.score.weight.grad.any())
    assert all(p.grad is not None for p in part.parameters())
    assert part.expected_k() == 2
    assert whole([Model(0)] * 3).expected_k() == 3


def test_whole_refuses_what_it_cannot_do() -> None:
    with pytest.raises(UserError, match="at least one"):
        whole([])
    with pytest.raises(UserError, match="without a router"):
        whole([Model(0)], losses=(SwitchBalance(),))
    with pytest.raises(UserError, match="router_input"):
        whole([Model(0), Model(1)], router=routers.Router())(TOKENS)
    with pytest.raises(UserError, match="expected logits"):
        whole([Model(0, "object"), nn.Sequential(Model(0), Wrong())])(TOKENS)
    plan = Plan(expert=torch.full((T, 1), -1), weight=torch.zeros(T, 1), num_experts=E)
    with pytest.raises(UserError, match="no unit chose any model"):
        whole([Model(e) for e in range(E)], router=routers.Router())(TOKENS, carry=live(plan)[1], router_input=units(D))


class Wrong(nn.Module):
    def forward(self, z: Tensor) -> list[Tensor]:
        return [z]
