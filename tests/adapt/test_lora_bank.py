"""Banks with low-rank updates: the float64 oracle, every gradient, and what is never made."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from adapt.adapt_cases import decoder, loss, perturb, tokens
from moestro.adapt import LoRA
from moestro.adapt.attach import attach
from moestro.adapt.lora.bank import LoRABank
from moestro.core.account import cost
from moestro.core.errors import UserError
from moestro.core.plan import Plan
from moestro.core.signals import Signals
from moestro.dispatch.config import Capacity
from moestro.experts.config import MLP, Experts, FeedForward, Gated, Modules
from moestro.ops.combine import combine, gather_rows, through
from moestro.ops.expert_mlp import naive
from moestro.ops.rows import rows as derive
from moestro.optim import AdamW
from moestro.testing.adapters import Largest
from moestro.testing.compare import assert_close
from moestro.testing.experts import check_exchange, check_experts, plan_for

D, E, T = 16, 4, 24

BANKS: dict[str, Experts] = {
    "gated": Gated(width=12),
    "gated_gelu": Gated(width=7, activation="gelu_tanh"),
    "gated_relu2": Gated(width=8, activation="relu2"),
    "mlp": MLP(width=12),
    "mlp_bias": MLP(width=10, bias=True, activation="relu"),
}
LORAS = {
    "apart": LoRA(rank=3, alpha=5.0),
    "joined": LoRA(rank=3, alpha=5.0, joined=True),
    "shared_a": LoRA(rank=2, shared="a"),
    "shared_b": LoRA(rank=2, shared="b", joined=True),
    "shared_both": LoRA(rank=2, shared="both"),
}


def make(bank: str, lora: str, parts: tuple[str, ...] | None = None, std: float = 0.3) -> LoRABank:
    torch.manual_seed(0)
    made = LoRABank(BANKS[bank].build(dim=D, num_experts=E), LORAS[lora], parts)
    if std:
        with torch.no_grad():
            for p in made.parameters():
                if p.requires_grad:
                    p.copy_(torch.randn(p.shape) * std)
    return made


def whole(bank: LoRABank, p: dict[str, Tensor], name: str) -> Tensor:
    """scale * B A of a part for all experts, written out. Zeros where it has none."""
    if name not in bank.pairs:
        return torch.zeros(())
    a, b = (t if t.ndim == 3 else t.expand(E, *t.shape) for t in (p[f"{name}_a"], p[f"{name}_b"]))
    return bank.lora.alpha / bank.lora.rank * torch.stack([y @ x for x, y in zip(a.unbind(0), b.unbind(0))])


def oracle(bank: LoRABank, rows: Tensor, p: dict[str, Tensor], offsets: Tensor) -> Tensor:
    """Row by row in float64, with the whole updated matrices of every expert."""
    down = p["down"] + whole(bank, p, "down")
    if not bank.gated:
        up = p["up"] + whole(bank, p, "up")
        biases = p.get("up_bias"), p.get("down_bias")
        return naive.mlp(rows, up, down, offsets, bank.config.activation, *biases)
    gate, up = p["gate_up"].chunk(2, dim=1)
    both = torch.cat([gate + whole(bank, p, "gate"), up + whole(bank, p, "up")], 1) + whole(bank, p, "gate_up")
    return naive.gated_mlp(rows, both, down, offsets, bank.config.activation)


@pytest.mark.parametrize("lora", LORAS)
@pytest.mark.parametrize("bank", BANKS)
def test_output_and_every_gradient_equal_the_oracle(bank: str, lora: str) -> None:
    for parts in (None, ("down",), ("up",)):
        made = make(bank, lora, parts).double()
        index = derive(plan_for(T, E, 2, starved=(1,)))
        x = torch.randn(index.unit.shape[0], D, dtype=torch.float64).requires_grad_()
        weight = torch.randn(x.shape, dtype=torch.float64)
        y = made(x, index)
        (y * weight).sum().backward()
        p = {n: t.detach().clone().requires_grad_(t.requires_grad) for n, t in made.named_parameters()}
        z = x.detach().clone().requires_grad_()
        want = oracle(made, z, p, index.offsets)
        (want * weight).sum().backward()
        assert_close("y", y, want, 1e-12)
        assert_close("gradient of x", x.grad, z.grad, 1e-12)
        trained = [n for n, t in made.named_parameters() if t.requires_grad]
        assert trained
        for n, t in made.named_parameters():
            if n in trained:
                assert_close(f"gradient of {n}", t.grad, p[n].grad, 1e-11)
            else:
                assert t.grad is None, f"the frozen {n} has a gradient"


@pytest.mark.parametrize("lora", LORAS)
@pytest.mark.parametrize("bank", ["gated", "mlp_bias"])
def test_the_suite_for_banks(bank: str, lora: str) -> None:
    check_experts(lambda: make(bank, lora), num_experts=E)


@pytest.mark.parametrize("bank", BANKS)
def test_at_the_start_it_is_the_source(bank: str) -> None:
    source = BANKS[bank].build(dim=D, num_experts=E)
    x, plan = torch.randn(T, D), plan_for(T, E, 2)
    want = source.mixture(x, plan).detach()
    assert_close("y", LoRABank(source, LoRA(rank=3)).mixture(x, plan), want, 1e-6)


def test_through_a_capacity_exchange() -> None:
    bank = make("gated", "shared_both")
    check_exchange(lambda b: Capacity().build(b), bank, num_experts=E, capacity=T)


def test_weights_of_rows_multiply_what_comes_out() -> None:
    bank, index = make("gated", "apart"), derive(plan_for(T, E, 2))
    x, weight = torch.randn(index.unit.shape[0], D), torch.rand(index.unit.shape[0])
    assert_close("y", bank(x, dataclasses.replace(index, weight=weight)), bank(x, index) * weight[:, None], 1e-6)


# Merging --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", LORAS)
@pytest.mark.parametrize("bank", BANKS)
def test_merged_it_computes_the_same_and_comes_back_to_the_bit(bank: str, lora: str) -> None:
    made = make(bank, lora).eval()
    x, plan = torch.randn(T, D), plan_for(T, E, 2)
    before = {n: p.detach().clone() for n, p in made.named_parameters()}
    want = made.mixture(x, plan).detach()
    made.merge()
    made.merge()  # once is enough
    assert_close("merged", made.mixture(x, plan), want, 1e-5)
    p = {n: t.double() for n, t in before.items()}
    name = "gate_up" if made.gated else "up"
    if name in made.pairs:
        delta = whole(made, p, name)
    else:
        delta = torch.cat([whole(made, p, "gate"), whole(made, p, "up")], 1)
    exact = (p[name] + delta).float()
    assert_close("merged weight", getattr(made, name), exact, 1e-7)
    with pytest.raises(UserError, match="add them twice"):
        made.state_dict()
    made.unmerge()
    assert all(torch.equal(p, before[n]) for n, p in made.named_parameters())
    made.merge(keep=False)
    made.unmerge()
    assert_close("taken out again", getattr(made, name), before[name], 1e-6)


def test_merged_it_does_not_train() -> None:
    bank = make("gated", "apart")
    bank.merge()
    with pytest.raises(UserError, match="merged adapters do not train"):
        bank.mixture(torch.randn(T, D), plan_for(T, E, 2))


def test_copies_and_casts_keep_source_and_adapters_together() -> None:
    bank = make("gated", "apart").eval()
    x, plan = torch.randn(T, D, dtype=torch.float64), plan_for(T, E, 2)
    other = copy.deepcopy(bank).double()
    other.merge()
    y = other.mixture(x, plan)
    assert other.source.gate_up is other.gate_up
    assert bank.source.gate_up is bank.gate_up
    assert not bank.merged
    assert_close("y", bank.mixture(x.float(), plan), y, 1e-5)


# Dropout --------------------------------------------------------------------------------------------------------------


def test_dropout_is_a_function_of_seed_and_unit() -> None:
    torch.manual_seed(0)
    bank = LoRABank(Gated(width=12).build(dim=D, num_experts=E), LoRA(rank=3, dropout=0.5), path="here")
    other = LoRABank(Gated(width=12).build(dim=D, num_experts=E), LoRA(rank=3, dropout=0.5), path="there")
    with torch.no_grad():
        for p in (bank.gate_b, bank.up_b, bank.down_b):
            p.normal_()
    other.load_state_dict(bank.state_dict())
    x, plan = torch.randn(T, D), plan_for(T, E, 2)
    ids = torch.arange(T) + 100
    run = lambda b, seed, ids, x=x, plan=plan: b.mixture(x, plan, Signals(seed=seed, unit_id=ids)).detach()  # noqa: E731
    y = run(bank, 1, ids)
    assert torch.equal(y, run(bank, 1, ids))
    assert not torch.allclose(y, run(bank, 2, ids))
    assert not torch.allclose(y, run(other, 1, ids))
    order = torch.randperm(T)  # a unit's mask goes with its id, wherever it stands
    moved = dataclasses.replace(plan, expert=plan.expert[order], weight=plan.weight[order])
    assert_close("moved", run(bank, 1, ids[order], x[order], moved), y[order], 1e-5)
    with torch.no_grad():
        clean = bank.eval().mixture(x, plan)
        assert torch.equal(clean, bank.mixture(x, plan, Signals(seed=5)))


def test_dropout_keeps_the_mean_and_its_gradient_is_that_of_the_mask() -> None:
    """The update of down, which is linear in what is dropped, has the undropped one as its mean over seeds."""
    torch.manual_seed(0)
    bank = LoRABank(MLP(width=8).build(dim=6, num_experts=2), LoRA(rank=2, dropout=0.3, partial=True), ("down",))
    with torch.no_grad():
        bank.down_b.normal_()
    x, plan = torch.randn(5, 6), plan_for(5, 2, 1)
    with torch.no_grad():
        clean = bank.eval().mixture(x, plan)
        bank.train()
        mean = torch.stack([bank.mixture(x, plan, Signals(seed=s)) for s in range(400)]).mean(0)
        base = bank.source.mixture(x, plan)
    assert_close("mean of the updates", mean - base, clean - base, 0.1)
    y = bank.mixture(x, plan, Signals(seed=1)).square().sum()
    (grad,) = torch.autograd.grad(y, bank.down_b)
    step = torch.zeros_like(bank.down_b)
    step[0, 1, 0] = 1e-2
    with torch.no_grad():
        bank.down_b += step
        more = bank.mixture(x, plan, Signals(seed=1)).square().sum()
        bank.down_b -= 2 * step
        less = bank.mixture(x, plan, Signals(seed=1)).square().sum()
    assert float((more - less) / 2e-2) == pytest.approx(float(grad[0, 1, 0]), rel=1e-2, abs=1e-3)


# What is never made ---------------------------------------------------------------------------------------------------


DELTA = 16 * 16 * 16  # numbers of the smallest update of all experts: that of gate, of up, or of down


def small_step(config: LoRA) -> Largest:
    moe = decoder().config.moe.replace(num_experts=16, experts=Gated(width=16))
    model = decoder(moe=moe)
    attach(model, config)
    perturb(model)
    optimizer = AdamW(lr=0.01).build(model)
    largest = Largest(*model.parameters())
    with largest:
        loss(model, tokens(1, 7)).backward()
        optimizer.step(1.0)
        optimizer.clear()
    return largest


@pytest.mark.parametrize("lora", LORAS)
def test_nothing_as_large_as_a_banks_update_is_made_during_a_step(lora: str) -> None:
    found = small_step(LORAS[lora].replace(dropout=0.1, rank=2))
    assert 0 < found.numel < DELTA, found.where


def test_that_way_of_looking_finds_a_materialised_update() -> None:
    weight = torch.randn(16, 16, 16)
    a, b = torch.randn(16, 2, 16, requires_grad=True), torch.randn(16, 16, 2)
    with Largest(weight) as found:
        (weight + b @ a).sum().backward()
    assert found.numel >= DELTA


# Counting and refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", ["apart", "joined", "shared_both"])
def test_flops_are_those_that_are_computed(lora: str) -> None:
    bank = make("gated", lora)
    bank.met = 2
    said = cost(bank)
    plan = plan_for(T, E, 2)
    x = torch.randn(T, D, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = through(bank, x, plan)
    assert counter.get_total_flops() == said.flops * T
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == (said.train_flops - said.flops) * T
    assert said.params == sum(p.numel() for p in bank.parameters())


def test_refusals() -> None:
    def bank(config: Experts) -> nn.Module:
        return config.build(dim=D, num_experts=E)

    for source, match in (
        (bank(Gated(width=(4, 5, 6, 7))), "unequal widths"),
        (bank(Gated(width=4, deterministic=True)), "deterministic=True"),
        (bank(Modules(experts=(FeedForward(),))), "ModuleBank is no stacked bank"),
        (make("gated", "apart"), "adapters already"),
    ):
        with pytest.raises(UserError, match=match):
            LoRABank(source, LoRA())  # type: ignore[arg-type]
    for values, match in (
        ({"rank": 0}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"targets": ()}, "attached to nothing"),
    ):
        with pytest.raises(UserError, match=match):
            LoRA(**values)


def test_combine_over_rows_equals_the_mixture() -> None:
    bank, plan = make("gated", "apart"), plan_for(T, E, 2)
    x = torch.randn(T, D)
    index = derive(plan)
    assert isinstance(plan, Plan)
    want = combine(bank(gather_rows(x, index), index), plan.weight, index)
    assert torch.equal(bank.mixture(x, plan), want)
