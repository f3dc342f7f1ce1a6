"""Mixtures as one operation, through every backend, against the oracle; what the registered ops promise."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.core.errors import UserError
from moestro.core.plan import AnyPlan, Plan
from moestro.ops.combine import combine, gather_rows, table_weight
from moestro.ops.expert_mlp import ACTIVATIONS, choose, gated_few, gated_mixture, gated_mlp, mlp, mlp_mixture
from moestro.ops.expert_mlp.few import FEW
from moestro.ops.rows import rows
from moestro.testing.compare import assert_close
from ops import expert_cases as oracle
from ops.expert_cases import SMALL, backends, prefer
from ops.ops_cases import compare, every_plan, generator, ragged_plan, randn, topk_plan, twice


@pytest.fixture(params=backends(), autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return prefer(request.param, monkeypatch)


def skewed(T: int = 40, E: int = 8) -> Plan:
    """One choice each, of expert e with probability in proportion to 1 / (e + 1)^2."""
    share = 1 / (torch.arange(E) + 1.0) ** 2
    expert = torch.multinomial(share.expand(T, E), 2, generator=generator(3))
    return Plan(expert=expert, weight=torch.rand(T, 2, generator=generator(4)), num_experts=E, complete=True)


PLANS: dict[str, AnyPlan] = {**every_plan(), "skewed": skewed()}
SIZES = {"aligned": (8, 12), "odd": (7, 5), "wide": (40, 33)}
NAMES = ["x", "weight", "first", "down", "first_bias", "down_bias"]


def gated(plan: AnyPlan, D: int, F: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    E = plan.num_experts
    return [randn(E, 2 * F, D, seed=1, dtype=dtype), randn(E, D, F, seed=2, dtype=dtype)]


def plain(plan: AnyPlan, D: int, F: int, biased: bool = False) -> list[Tensor]:
    E = plan.num_experts
    biases = [randn(E, F, seed=3), randn(E, D, seed=4)] if biased else []
    return [randn(E, F, D, seed=1), randn(E, D, F, seed=2), *biases]


def check(plan: AnyPlan, parameters: list[Tensor], mine: Any, theirs: Any, *rest: Any, **options: Any) -> None:
    """Output and every gradient against the oracle."""
    index = rows(plan)
    weight = table_weight(plan, index)
    D = parameters[0].shape[-1]
    compare(
        NAMES[: 2 + len(parameters)],
        lambda x, w, a, b, *c: mine(x, w, index, a, b, *rest, *c),
        lambda x, w, a, b, *c: theirs(x, w, index, a, b, *rest, *c),
        [randn(index.num_units, D, dtype=parameters[0].dtype), weight, *parameters],
        **options,
    )


@pytest.mark.parametrize("plan", PLANS)
def test_gated(plan: str) -> None:
    check(PLANS[plan], gated(PLANS[plan], 8, 12), gated_mixture, oracle.gated_mixture)


@pytest.mark.parametrize("plan", PLANS)
def test_plain(plan: str) -> None:
    check(PLANS[plan], plain(PLANS[plan], 8, 12, biased=True), mlp_mixture, oracle.mlp_mixture, "gelu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", SIZES)
def test_activations_and_sizes(activation: str, sizes: str) -> None:
    plan = ragged_plan(T=9)
    check(plan, gated(plan, *SIZES[sizes]), gated_mixture, oracle.gated_mixture, activation, expanded=True)
    check(plan, plain(plan, *SIZES[sizes]), mlp_mixture, oracle.mlp_mixture, activation)


@pytest.mark.parametrize("plan", ["top2", "ragged", "no rows", "skewed", "dense"])
def test_unequal_widths(plan: str) -> None:
    E = PLANS[plan].num_experts
    widths = (5, 16, 1, 9, 7, 30, 2, 4)[:E]
    parameters = [randn(2 * sum(widths), 8, seed=1), randn(sum(widths), 8, seed=2)]
    check(PLANS[plan], parameters, gated_mixture, oracle.gated_mixture, "silu", widths)


def test_one_bias() -> None:
    plan, parameters = ragged_plan(), plain(ragged_plan(), 8, 12)
    for place, bias in ((0, randn(6, 12, seed=3)), (1, randn(6, 8, seed=4))):

        def both(b: Tensor, place: int = place) -> tuple[Any, Any]:
            return (None, b) if place else (b, None)

        check(
            plan,
            [*parameters, bias],
            lambda x, w, i, a, b, act, c, both=both: mlp_mixture(x, w, i, a, b, act, *both(c)),
            lambda x, w, i, a, b, act, c, both=both: oracle.mlp_mixture(x, w, i, a, b, act, *both(c)),
            "relu",
        )


def test_strides_do_not_matter() -> None:
    plan = topk_plan(T=9)
    index, weight = rows(plan), plan.weight
    x, (up, down) = randn(9, 8), gated(plan, 8, 12)

    def turned(t: Tensor) -> Tensor:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_()

    results = []
    for shape in (lambda t: t.clone().requires_grad_(), turned):
        leaves = [shape(t) for t in (x, weight, up, down)]
        y = gated_mixture(leaves[0], leaves[1], index, leaves[2], leaves[3])
        y.backward(randn(8, 9, seed=7).t())
        results.append([y.detach(), *(t.grad for t in leaves)])
    for name, a, b in zip(("y", *NAMES), *results):
        assert_close(name, b, a, 1e-5)


def test_half_precision() -> None:
    plan = ragged_plan()
    check(plan, gated(plan, 8, 12, torch.bfloat16), gated_mixture, oracle.gated_mixture, tol=1.5e-2)


def test_float64_with_weights_in_fp32() -> None:
    plan = ragged_plan(T=9)
    parameters = [t.double() for t in plain(plan, 8, 12, biased=True)]
    check(plan, parameters, mlp_mixture, oracle.mlp_mixture, "gelu", tol=1e-7)


def test_autocast() -> None:
    plan = ragged_plan()
    index = rows(plan)
    leaves = [t.requires_grad_() for t in (randn(23, 8), plan.weight.clone(), *gated(plan, 8, 12))]
    with torch.autocast("cpu", torch.bfloat16):
        y = gated_mixture(leaves[0], leaves[1], index, leaves[2], leaves[3])
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert_close("y", y.float(), oracle.gated_mixture(leaves[0], leaves[1], index, leaves[2], leaves[3]), 2e-2)
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in leaves)


def test_gradcheck() -> None:
    plan = ragged_plan(T=4, K=2, E=3)
    index = rows(plan)
    leaves = [t.double().requires_grad_() for t in (randn(4, 3), plan.weight, *gated(plan, 3, 2))]
    torch.autograd.gradcheck(lambda x, w, a, b: gated_mixture(x, w, index, a, b), leaves)
    biased = [t.double().requires_grad_() for t in (randn(4, 3), plan.weight, *plain(plan, 3, 2, biased=True))]
    torch.autograd.gradcheck(lambda x, w, a, b, *c: mlp_mixture(x, w, index, a, b, "gelu", *c), biased)


def test_same_bits_twice() -> None:
    plan = topk_plan(T=200, K=3)
    index = rows(plan)
    twice(lambda x, w, a, b: gated_mixture(x, w, index, a, b), [randn(200, 40), plan.weight, *gated(plan, 40, 33)])


@pytest.mark.parametrize("form", ["rows", "mixture"])
@pytest.mark.parametrize("place", range(6))
def test_only_what_is_asked_for(place: int, form: str) -> None:
    """A gradient is the same whether the others are wanted or not, and those not wanted are not made."""
    plan = ragged_plan(T=9)
    index = rows(plan)
    if form == "rows" and place == 1:
        return  # there is no combine weight
    values = [randn(9, 8), plan.weight, *plain(plan, 8, 12, biased=True)]

    def run(leaves: list[Tensor]) -> Tensor:
        x, w, up, down, b1, b2 = leaves
        if form == "mixture":
            return mlp_mixture(x, w, index, up, down, "silu", b1, b2)
        return mlp(x.index_select(0, index.unit), up, down, index.offsets, "silu", b1, b2)

    every = [v.clone().requires_grad_() for v in values]
    run(every).square().sum().backward()
    one = [v.clone().requires_grad_(i == place) for i, v in enumerate(values)]
    run(one).square().sum().backward()
    want = every[place].grad
    assert want is not None
    assert_close(NAMES[place], one[place].grad, want, 1e-5)
    assert [v.grad is not None for v in one] == [i == place for i in range(6)]


def test_what_is_saved() -> None:
    """Besides inputs and index: the pre-activations of R rows. Neither gathered rows nor expert outputs."""
    plan = topk_plan(T=20)
    index = rows(plan)
    x, weight = randn(20, 8).requires_grad_(), plan.weight.clone().requires_grad_()
    up, down = (t.requires_grad_() for t in gated(plan, 8, 12))
    known = {t.untyped_storage().data_ptr() for t in (x, weight, up, down)}
    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known and t.is_floating_point():
            sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        gated_mixture(x, weight, index, up, down)
    assert sum(sizes) == 40 * 2 * 12


def test_a_unit_without_a_row_sees_nobody() -> None:
    """NaN in one unit stays in it, and in the experts that it chose; the weight of an absent choice has no gradient."""
    expert = torch.tensor([[0, 1], [2, -1], [-1, -1]])
    plan = Plan(expert=expert, weight=torch.tensor([[0.5, 0.5], [0.7, 0.0], [0.0, 0.0]]), num_experts=4)
    x = randn(3, 8)
    x[0] = float("nan")
    leaves = [t.requires_grad_() for t in (x, plan.weight.clone(), *gated(plan, 8, 12))]
    y = gated_mixture(leaves[0], leaves[1], rows(plan), leaves[2], leaves[3])
    y.sum().backward()
    assert bool(y[0].isnan().all())
    assert bool(y[1].isfinite().all())
    assert not y[2].any()
    d_x, d_weight, d_up, d_down = (t.grad for t in leaves)
    assert d_x is not None
    assert d_weight is not None
    assert bool(d_x[1].isfinite().all())
    assert not d_x[2].any()
    assert not d_weight[expert < 0].any()
    for d in (d_up, d_down):
        assert d is not None
        assert bool(d[2].isfinite().all())
        assert not d[3].any()


def test_it_is_gather_experts_combine() -> None:
    plan = ragged_plan()
    index, (up, down) = rows(plan), gated(plan, 8, 12)
    x = randn(23, 8)
    steps = combine(gated_mlp(gather_rows(x, index), up, down, index.offsets), plan.weight, index)
    assert_close("y", gated_mixture(x, plan.weight, index, up, down), steps, 1e-6)


def test_no_second_derivative() -> None:
    plan = topk_plan(T=5)
    x, (up, down) = randn(5, 8).requires_grad_(), gated(plan, 8, 12)
    y = gated_mixture(x, plan.weight, rows(plan), up, down)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(UserError, match="cannot be differentiated again"):
        grad.sum().backward()


def test_deterministic_rows() -> None:
    """Bitwise the same row alone and in a batch, where a backend promises it; else one line that says why not."""
    plan = topk_plan(T=37, K=3)
    x, (up, down) = randn(37, 40), gated(plan, 40, 33)

    def run(keep: slice) -> Tensor:
        part = dataclasses.replace(plan, expert=plan.expert[keep], weight=plan.weight[keep])
        return gated_mixture(x[keep], part.weight, rows(part), up, down, deterministic=True)

    if not any(b.supported(dataclasses.replace(SMALL, deterministic=True))[0] for b in choose.BACKENDS):
        with pytest.raises(UserError, match=r"^deterministic=True: nothing here promises it[^\n]*$"):
            run(slice(None))
        return
    whole = run(slice(None))
    for t in (0, 5, 36):
        assert torch.equal(run(slice(t, t + 1)), whole[t : t + 1])
    assert torch.equal(run(slice(3, 20)), whole[3:20])


def test_explain() -> None:
    text = choose.explain(SMALL).splitlines()
    assert text[0].startswith("20 rows of 4 gated experts, D 8, F 12, float32 on cpu: ")
    assert sum("chosen (" in line for line in text) == 1
    assert len(text) == 1 + len({b.NAME for b in choose.BACKENDS})


def test_opcheck() -> None:
    plan = ragged_plan(T=5)
    index = rows(plan)
    x, weight = randn(5, 8).requires_grad_(), plan.weight.clone().requires_grad_()
    up, down = (t.requires_grad_() for t in gated(plan, 8, 12))
    table = index.unit, index.slot, index.inverse, weight
    mixture = (x, up, down, index.offsets, "silu", True, *table, None, None, None, False, None)
    torch.library.opcheck(torch.ops.moestro.experts.default, (*mixture, True))
    widths = [3, 9, 12, 1, 5, 6]
    flat = [randn(2 * sum(widths), 8).requires_grad_(), randn(sum(widths), 8).requires_grad_()]
    rest = (index.offsets, "silu", True, *table, None, None, widths, False, None)
    # Not the comparison of outputs: `hidden` has room for the widest everywhere, and what is not needed is not filled.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.moestro.experts.default, (x, *flat, *rest, True), test_utils=tests)
    first, second, *biases = (t.requires_grad_() for t in plain(plan, 8, 12, biased=True))
    in_rows = x.detach().index_select(0, index.unit).requires_grad_()
    on_rows = (in_rows, first, second, index.offsets, "gelu", False, None, None, None, None, *biases, None, False, None)
    torch.library.opcheck(torch.ops.moestro.experts.default, (*on_rows, True))
    clamped = (in_rows, up, down, index.offsets, "silu", True, None, None, None, None, None, None, None, False)
    torch.library.opcheck(torch.ops.moestro.experts.default, (*clamped, [1.5, 2.0], True))
    plainly = [t.detach() if isinstance(t, Tensor) else t for t in mixture]
    with torch.no_grad():
        y, hidden = torch.ops.moestro.experts(*plainly, True)
    wanted = [True, True, True, False, False, False]
    arguments = (torch.ones_like(y), hidden, *plainly, wanted)
    torch.library.opcheck(torch.ops.moestro.experts_backward.default, arguments)


def test_errors() -> None:
    plan = topk_plan(T=5)
    index, (up, down) = rows(plan), gated(plan, 8, 12)
    x = randn(5, 8)
    with pytest.raises(UserError, match="gated_mixture: the index is about 5 units, x has 4"):
        gated_mixture(x[1:], plan.weight, index, up, down)
    with pytest.raises(UserError, match=r"weight must be \[5, 2\], not \[5, 1\]"):
        gated_mixture(x, plan.weight[:, :1], index, up, down)
    with pytest.raises(UserError, match="gated_mixture: gate_up"):
        gated_mixture(x, plan.weight, index, up[:, 1:], down)
    with pytest.raises(UserError, match="unknown activation"):
        mlp_mixture(x, plan.weight, index, up[:, :12], down, "sine")
    with pytest.raises(UserError, match="cast them to one dtype"):
        gated_mixture(x.bfloat16(), plan.weight, index, up, down)


# A few units, from the table -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("T", [0, 1, 4])
def test_few(T: int, activation: str) -> None:
    """Absent ids, ids of nobody and repeated ids; the same sum as the mixture."""
    plan = dataclasses.replace(ragged_plan(T=T), valid=None, kept=None)
    x, (up, down) = randn(T, 8), gated(plan, 8, 12)
    got = gated_few(x, plan.expert, plan.weight, up, down, activation)
    want = oracle.gated_mixture(x, plan.weight, rows(plan), up, down, activation)
    assert_close("y", got, want, 1e-5)


@pytest.mark.parametrize(("D", "F"), [(7, 5), (40, 33), (64, 96)])
def test_few_in_all_dtypes(D: int, F: int) -> None:
    plan = topk_plan(T=3, K=FEW // 3)
    for dtype, tol in ((torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 1.5e-2)):
        x, (up, down) = randn(3, D, dtype=dtype), gated(plan, D, F, dtype)
        got = gated_few(x, plan.expert, plan.weight, up, down)
        assert got.dtype == dtype
        assert_close(str(dtype), got, oracle.gated_mixture(x, plan.weight, rows(plan), up, down), tol)


def test_few_has_no_gradient() -> None:
    plan = topk_plan(T=1)
    x, (up, down) = randn(1, 8), gated(plan, 8, 12)
    with pytest.raises(UserError, match="gated_few has no gradient"):
        gated_few(x.requires_grad_(), plan.expert, plan.weight, up, down)
    with torch.no_grad():
        torch.library.opcheck(
            torch.ops.moestro.experts_few.default, (x.detach(), plan.expert, plan.weight, up, down, "silu")
        )
    with pytest.raises(UserError, match="unknown activation"):
        gated_few(x.detach(), plan.expert, plan.weight, up, down, "sine")
    for dtype in (torch.float32, torch.float64):  # compiled and not
        with pytest.raises(UserError, match=r"gated_few: x \[1, 8\].* do not fit"):
            gated_few(x.detach().to(dtype), plan.expert, plan.weight, up.to(dtype), down[:, 1:].to(dtype))


def test_few_follows_its_strides() -> None:
    plan = topk_plan(T=2)
    x, (up, down) = randn(2, 8), gated(plan, 8, 12)
    tensors = (x, plan.expert, plan.weight, up, down)
    a, b, c, d, e = (t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in tensors)
    assert_close("y", gated_few(a, b, c, d, e), gated_few(x, plan.expert, plan.weight, up, down), 1e-6)
