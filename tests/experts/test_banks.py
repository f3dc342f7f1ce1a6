"""Banks against a loop over experts in float64, and what banks promise besides their values."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from moestro.core.account import cost
from moestro.core.config import Config
from moestro.core.errors import UserError
from moestro.core.params import describe
from moestro.core.rows import Rows
from moestro.experts import MLP, ClampedGated, Convolution, Experts, FeedForward, Gated, Modules, examples
from moestro.experts.clamped import ClampedGatedBank
from moestro.experts.extended import ExtendedBank
from moestro.experts.mlp import MLPBank
from moestro.experts.modules import ModuleBank
from moestro.ops.rows import rows as derive
from moestro.testing.compare import assert_close
from moestro.testing.experts import check_experts, plan_for

D, E, T = 16, 4, 24
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda h: F.relu(h) ** 2,
    "leaky_relu": lambda h: torch.where(h > 0, h, 0.01 * h),
}


def gated_oracle(bank: nn.Module, p: dict[str, Tensor], x: Tensor, e: int) -> Tensor:
    act = ACTIVATIONS[bank.config.activation]
    if bank.widths is None:
        gate, up = p["gate_up"].unbind(0)[e].chunk(2)
        down = p["down"].unbind(0)[e]
    else:
        gate, up = p["gate_up"].split([2 * w for w in bank.widths])[e].chunk(2)
        down = p["down"].split(list(bank.widths))[e].T
    return (act(x @ gate.T) * (x @ up.T)) @ down.T


def clamped_oracle(bank: nn.Module, p: dict[str, Tensor], x: Tensor, e: int) -> Tensor:
    part, limit = {n: t.unbind(0)[e] for n, t in p.items()}, bank.config.limit
    gate, up = (x @ part["gate_up"].T + part.get("gate_up_bias", 0)).chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (gate * torch.sigmoid(bank.config.alpha * gate) * (up + 1)) @ part["down"].T + part.get("down_bias", 0)


def mlp_oracle(bank: nn.Module, p: dict[str, Tensor], x: Tensor, e: int) -> Tensor:
    part = {n: t.unbind(0)[e] for n, t in p.items()}
    h = ACTIVATIONS[bank.config.activation](x @ part["up"].T + part.get("up_bias", 0))
    return h @ part["down"].T + part.get("down_bias", 0)


def extended_oracle(bank: nn.Module, p: dict[str, Tensor], x: Tensor, e: int) -> Tensor:
    part = {n: t.unbind(0)[e] for n, t in p.items()}
    h = ACTIVATIONS[bank.config.activation](x @ part["up"].T + part.get("up_bias", 0))
    return (h * (x @ part["new"].T + part["new_bias"])) @ part["down"].T + part.get("down_bias", 0)


def module_oracle(bank: nn.Module, p: dict[str, Tensor], x: Tensor, e: int) -> Tensor:
    part = {n.removeprefix(f"{e}."): t for n, t in p.items() if n.startswith(f"{e}.")}
    return torch.func.functional_call(copy.deepcopy(bank.members()[e]).double(), part, (x,))


def oracle(bank: nn.Module, p: dict[str, Tensor], rows: Tensor, index: Rows) -> Tensor:
    """Row by row, in float64."""
    kinds = {ModuleBank: module_oracle, MLPBank: mlp_oracle, ClampedGatedBank: clamped_oracle}
    kinds[ExtendedBank] = extended_oracle
    kind = kinds.get(type(bank), gated_oracle)
    made = [kind(bank, p, rows[r : r + 1], int(e)) for r, e in enumerate(index.expert)]
    return torch.cat(made)


def index_for(starved: tuple[int, ...] = ()) -> Rows:
    return derive(plan_for(T, E, 2, starved=starved))


@pytest.mark.parametrize("starved", [(), (0, 3)], ids=["fed", "starved"])
@pytest.mark.parametrize("name", examples())
def test_output_and_all_gradients_equal_the_oracle(name: str, starved: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    bank = examples()[name].build(dim=D, num_experts=E)
    index = index_for(starved)
    rows = torch.randn(2 * T, D, requires_grad=True)
    direction = torch.randn(2 * T, D)
    out = bank(rows, index)
    (out * direction).sum().backward()

    exact = {n: p.detach().double().requires_grad_() for n, p in bank.named_parameters()}
    exact_rows = rows.detach().double().requires_grad_()
    want = oracle(bank, exact, exact_rows, index)
    (want * direction.double()).sum().backward()
    assert_close("output", out, want)
    assert exact_rows.grad is not None
    assert_close("rows.grad", rows.grad, exact_rows.grad)
    for n, p in bank.named_parameters():
        grad = exact[n].grad
        assert_close(f"{n}.grad", p.grad, torch.zeros_like(exact[n]) if grad is None else grad)


@pytest.mark.parametrize("name", examples())
def test_conformance(name: str) -> None:
    check_experts(lambda: examples()[name].build(dim=D, num_experts=E), num_experts=E, unit=(D,))


@pytest.mark.parametrize("name", examples())
def test_configs_travel_as_json(name: str) -> None:
    made = examples()[name]
    assert Experts.from_dict(made.to_dict()) == made


def test_banks_of_one() -> None:
    for made in (Gated(width=6), MLP(width=6, bias=True), ClampedGated(width=6), Modules()):
        check_experts(lambda made=made: made.build(dim=8, num_experts=1), num_experts=1, unit=(8,), gradcheck=False)


@pytest.mark.parametrize("name", examples())
def test_weights_of_rows_multiply_what_comes_out(name: str) -> None:
    bank = examples()[name].build(dim=D, num_experts=E)
    index = index_for()
    rows, weight = torch.randn(2 * T, D), torch.rand(2 * T)
    got = bank(rows, dataclasses.replace(index, weight=weight))
    assert_close("weighted rows", got, weight[:, None] * bank(rows, index))


@pytest.mark.parametrize("name", examples())
def test_autocast_computes_in_bf16_and_gives_gradients_in_fp32(name: str) -> None:
    torch.manual_seed(0)
    bank = examples()[name].build(dim=D, num_experts=E)
    rows = torch.randn(2 * T, D)
    exact = bank(rows, index_for())
    with torch.autocast("cpu", torch.bfloat16):
        out = bank(rows, index_for())
    assert out.dtype == torch.bfloat16
    assert_close("bf16 output", out, exact, tol=2e-2)
    assert not torch.equal(out.float(), exact)
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in bank.parameters())


@pytest.mark.parametrize("name", examples())
def test_accounting_equals_what_was_allocated_and_multiplied(name: str) -> None:
    made, dim, top_k = examples()[name], 10, 2
    bank = made.build(dim=dim, num_experts=E)
    bank.met = top_k
    counted = cost(bank)
    assert counted.params == sum(p.numel() for p in bank.parameters())
    assert counted.active == round(counted.params * top_k / E)
    # The same number of rows for every expert: the mean over experts of unequal size is then exact.
    index = derive(plan_for(E, E, E))
    with FlopCounterMode(display=False) as flops:
        bank(torch.randn(E * E, dim), index)
    assert counted.flops == flops.get_total_flops() / E * top_k / E


def test_accounting_from_configs_builds_nothing() -> None:
    assert Gated(width=5).num_params(dim=7, num_experts=3) == 3 * 3 * 5 * 7
    assert MLP(width=5, bias=True).num_params(dim=7, num_experts=3) == 3 * (2 * 5 * 7 + 5 + 7)
    assert Gated(width=(2, 3)).flops_per_token(1, dim=7, num_experts=2) == 2 * 3 * 5 * 7


@pytest.mark.parametrize("name", examples())
def test_meta_device(name: str) -> None:
    with torch.device("meta"):
        bank = examples()[name].build(dim=D, num_experts=E)
    assert all(p.is_meta for p in bank.parameters())


@pytest.mark.parametrize("name", examples())
def test_copies_share_nothing(name: str) -> None:
    bank = examples()[name].build(dim=D, num_experts=E)
    other = copy.deepcopy(bank)
    rows = torch.randn(2 * T, D)
    before = bank(rows, index_for())
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
    assert torch.equal(bank(rows, index_for()), before)
    assert not torch.equal(other(rows, index_for()), before)


def test_parameters_are_named_and_described() -> None:
    gated = Gated(width=6).build(dim=8, num_experts=3)
    assert {n: tuple(p.shape) for n, p in gated.named_parameters()} == {"gate_up": (3, 12, 8), "down": (3, 8, 6)}
    info = describe(gated)["gate_up"]
    assert (info.role, info.expert_axis, info.matrix_axes, info.parts) == ("expert", 0, (1, 2), ("gate", "up"))
    biased = MLP(width=6, bias=True).build(dim=8, num_experts=3)
    assert {n: tuple(p.shape) for n, p in biased.named_parameters()} == {
        "up": (3, 6, 8),
        "down": (3, 8, 6),
        "up_bias": (3, 6),
        "down_bias": (3, 8),
    }
    info = describe(biased)["up_bias"]
    assert (info.expert_axis, info.matrix_axes, info.decay) == (0, None, False)
    clamped = ClampedGated(width=6).build(dim=8, num_experts=3)
    assert {n: tuple(p.shape) for n, p in clamped.named_parameters()} == {
        "gate_up": (3, 12, 8),
        "down": (3, 8, 6),
        "gate_up_bias": (3, 12),
        "down_bias": (3, 8),
    }
    assert (describe(clamped)["gate_up_bias"].decay, describe(clamped)["gate_up"].parts) == (False, ("gate", "up"))
    listed = Modules().build(dim=8, num_experts=2)
    assert set(dict(listed.named_parameters())) == {
        f"{e}.{part}.{kind}" for e in (0, 1) for part in ("up", "down") for kind in ("weight", "bias")
    }
    assert describe(listed)["1.up.weight"].role == "expert"
    # Blocks of unequal widths are no stack of equal matrices, and must not be taken for one matrix either.
    packed = describe(Gated(width=(2, 4)).build(dim=8, num_experts=2))["down"]
    assert (packed.role, packed.expert_axis, packed.matrix_axes) == ("expert", None, None)


def test_unequal_widths_do_the_work_of_their_widths_only() -> None:
    widths = (2, 3, 7, 12)
    uneven = Gated(width=widths).build(dim=D, num_experts=E)
    even = Gated(width=6).build(dim=D, num_experts=E)
    index, rows = derive(plan_for(E, E, E)), torch.randn(E * E, D)
    totals = []
    for bank in (uneven, even):
        with FlopCounterMode(display=False) as flops:
            bank(rows, index).sum().backward()
        totals.append(flops.get_total_flops())
    assert totals[0] == totals[1]
    assert sum(p.numel() for p in uneven.parameters()) == sum(p.numel() for p in even.parameters())


def test_initial_values_follow_each_experts_own_width() -> None:
    torch.manual_seed(0)
    bank = Gated(width=(4, 400)).build(dim=64, num_experts=2)
    narrow, wide = bank.down.detach().split([4, 400])
    assert 0.35 < float(narrow.abs().max()) <= 0.5
    assert 0.045 < float(wide.abs().max()) <= 0.05


# Banks of modules -------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Rows times a factor, plus whatever context came."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, rows: Tensor, context: Tensor | None = None) -> Tensor:
        out = rows * self.factor
        return out if context is None else out + context


@pytest.mark.parametrize("unit", [(5, 8), (8, 6, 6)], ids=["sequence", "image"])
def test_units_of_any_shape(unit: tuple[int, ...]) -> None:
    def make() -> nn.Module:
        if len(unit) == 2:
            return ModuleBank(lambda e: nn.Sequential(nn.Linear(8, 8 + e), nn.GELU(), nn.Linear(8 + e, 8)), 8, 3)
        return Modules(experts=(Convolution(), Convolution(kernel=1), Convolution(kernel=5))).build(
            dim=8, num_experts=3
        )

    check_experts(make, num_experts=3, unit=unit, units=8, gradcheck=False)


def test_a_list_of_modules_and_a_context() -> None:
    bank = ModuleBank([Scaled(float(e)) for e in range(E)])
    index, rows, context = index_for(), torch.randn(2 * T, D), torch.randn(D)
    want = rows * index.expert[:, None] + context
    assert_close("with context", bank(rows, index, context), want, tol=1e-6)
    assert_close("without", bank(rows, index), rows * index.expert[:, None], tol=1e-6)


def test_output_units_of_another_shape_even_without_rows() -> None:
    bank = ModuleBank(lambda e: nn.Conv2d(3, 5, 3, stride=2), num_experts=2)
    plan = plan_for(4, 2, 1)
    out = bank(torch.randn(4, 3, 9, 9), derive(plan))
    assert out.shape == (4, 5, 4, 4)
    nothing = derive(dataclasses.replace(plan, expert=torch.full((4, 1), -1), weight=torch.zeros(4, 1), complete=False))
    rows = torch.randn(0, 3, 9, 9, requires_grad=True)
    out = bank(rows, nothing)
    assert out.shape == (0, 5, 4, 4)
    out.sum().backward()
    assert rows.grad is not None
    assert all(p.grad is not None and not p.grad.any() for p in bank.parameters())


def test_idle_experts_keep_their_running_statistics() -> None:
    bank = ModuleBank(lambda e: nn.BatchNorm1d(D), num_experts=E)
    bank(torch.randn(2 * T, D), index_for(starved=(1,)))
    moved = [int(m.num_batches_tracked) for m in bank.members()]
    assert moved == [1, 0, 1, 1]
    bank(torch.randn(0, D), derive(plan_for(0, E, 1)))
    assert [int(m.num_batches_tracked) for m in bank.members()] == moved


def test_one_module_for_several_experts() -> None:
    shared = Scaled(3.0)
    bank = ModuleBank([shared, Scaled(1.0), shared, Scaled(2.0)])
    index, rows = index_for(), torch.randn(2 * T, D)
    factor = torch.tensor([3.0, 1.0, 3.0, 2.0])[index.expert]
    assert_close("shared module", bank(rows, index), rows * factor[:, None], tol=1e-6)
    assert cost(bank).params == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gated(width=(4, 5)).build(dim=8, num_experts=3), "2 widths for 3 experts"),
        (lambda: Gated(width=0), "at least 1"),
        (lambda: Gated(width=()), "empty tuple"),
        (lambda: Modules(experts=(FeedForward(), FeedForward())).build(dim=8, num_experts=3), "2 configs for 3"),
        (lambda: Modules(experts=()), "empty tuple"),
        (lambda: ModuleBank([nn.Identity()], num_experts=2), "1 modules for 2 experts"),
        (lambda: ModuleBank(lambda e: nn.Identity()), "num_experts is needed"),
        (lambda: Convolution(kernel=2), "odd"),
        (lambda: Config.from_dict({"type": "experts.Gated", "widht": 3}), "did you mean 'width'"),
    ],
)
def test_clear_errors(make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("name", ["gated", "mlp", "modules"])
def test_substituted_weights_must_exist(name: str) -> None:
    bank = examples()[name].build(dim=D, num_experts=E)
    with pytest.raises(UserError, match="no parameter 'gate'"):
        bank(torch.randn(2 * T, D), index_for(), None, {"gate": torch.zeros(1)})


@pytest.mark.parametrize("name", ["gated", "modules"])
def test_substituted_weights_receive_the_gradient(name: str) -> None:
    bank = examples()[name].build(dim=D, num_experts=E)
    own = {n: (p.detach() * 2).requires_grad_() for n, p in bank.named_parameters()}
    bank(torch.randn(2 * T, D), index_for(starved=(0,)), None, own).sum().backward()
    assert all(p.grad is None for p in bank.parameters())
    assert all(t.grad is not None for t in own.values())
