"""Losses on pairs and on two predictions, against numbers worked out by hand from the briefs' equations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moestro.core.errors import UserError
from moestro.core.plan import Plan
from moestro.losses import MNR, MNRPlus, MutualInformation, PairLoss, SpecifiedExpert, pair_examples
from moestro.losses.consistency import symmetric_kl
from moestro.testing.compare import assert_close

A = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
B = torch.tensor([[3.0, 1.0], [1.0, 1.0]], dtype=torch.float64)


def nats(*scores: float, at: int) -> float:
    return math.log(sum(math.exp(s) for s in scores)) - scores[at]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Two predictions: THOR, brief 02, step 4 ----------------------------------------------------------------------------


def test_consistency_of_brief_02_step_4() -> None:
    """p = (3/4, 1/4), q = (1/2, 1/2): 1/2 sum (p - q)(log p - log q) = 1/2 * 1/4 * log 3."""
    p, q = torch.tensor([[math.log(3.0), 0.0]]).double(), torch.zeros(1, 2).double()
    assert float(symmetric_kl(p, q)) == pytest.approx(math.log(3) / 8)
    both = (torch.distributions.Categorical(logits=t) for t in (p, q))
    one, two = both
    kl = torch.distributions.kl_divergence
    assert float(symmetric_kl(p, q)) == pytest.approx(float(kl(one, two) + kl(two, one)) / 2)


def test_consistency_is_symmetric_not_negative_and_blind_to_padding() -> None:
    p, q = random(5, 3, 7), random(5, 3, 7, seed=1)
    counted = torch.arange(15).view(5, 3) % 4 > 0
    got = symmetric_kl(p, q, counted)
    assert float(got) > 0
    assert_close("swapped", symmetric_kl(q, p, counted), got, 1e-12)
    assert_close("rows", symmetric_kl(p[counted], q[counted]), got, 1e-12)
    loud = torch.where(counted[..., None], p, 1e30).requires_grad_()
    symmetric_kl(loud, q, counted).backward()
    assert loud.grad is not None
    assert not loud.grad[~counted].any()
    assert float(symmetric_kl(p, p)) == 0.0


def test_consistency_has_its_gradient_through_both_and_no_nan() -> None:
    p, q = random(4, 5).requires_grad_(), random(4, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(symmetric_kl, (p, q))
    far = torch.tensor([[0.0, 200.0]], requires_grad=True)
    value = symmetric_kl(far, torch.zeros(1, 2))
    value.backward()
    assert float(value.detach()) == pytest.approx(50.0), "a probability below the smallest number: 1/2 * 1/2 * 200"
    assert bool(torch.isfinite(far.grad).all())  # type: ignore[arg-type]
    assert symmetric_kl(far.bfloat16(), far.bfloat16()).dtype == torch.float32
    with pytest.raises(UserError, match="symmetric_kl"):
        symmetric_kl(p, q[:3])


# Pairs: brief 34 ----------------------------------------------------------------------------------------------------


def test_mnr_of_brief_34() -> None:
    """A B^T = [[3, 1], [2, 2]], targets on the diagonal."""
    want = [nats(3, 1, at=0), nats(2, 2, at=1)]
    assert MNR().build()(A, B).tolist() == pytest.approx(want)
    assert MNR(temperature=2.0).build()(A, B).tolist() == pytest.approx([nats(1.5, 0.5, at=0), math.log(2)])
    back = [nats(3, 2, at=0), nats(1, 2, at=1)]
    assert MNR(symmetric=True).build()(A, B).tolist() == pytest.approx([(f + b) / 2 for f, b in zip(want, back)])


def test_mnr_plus_of_brief_34() -> None:
    """(A A^T + B B^T) / 2 = [[5.5, 2], [2, 3]]: both targets on the diagonal."""
    assert MNRPlus().build()(A, B).tolist() == pytest.approx(MNR(symmetric=True).build()(A, B).tolist())


def test_mnr_plus_whose_target_is_a_longer_neighbour() -> None:
    """a = b = rows of 1 and 3: similarities [[1, 3], [3, 9]]; T rows have their largest entry at 1 and 1; over the
    columns T = [[.12, .88], [.002, .998]] has its largest at 0 and 1."""
    x = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    want = [(nats(1, 3, at=1) + nats(1, 3, at=0)) / 2, nats(3, 9, at=1)]
    assert MNRPlus().build()(x, x).tolist() == pytest.approx(want)


def test_mnr_plus_is_symmetric_cross_entropy_where_rows_are_normalised() -> None:
    a, b = random(3, 6, 8), random(3, 6, 8, seed=1)
    got = MNRPlus(normalised=True, temperature=0.2).build()(a, b)
    assert_close("nats", got, MNR(symmetric=True, normalised=True, temperature=0.2).build()(a, b), 1e-12)


@pytest.mark.parametrize("name", pair_examples())
def test_groups_precision_and_gradients(name: str) -> None:
    loss, a, b = pair_examples()[name].build(), random(2, 5, 4), random(2, 5, 4, seed=1)
    got = loss(a, b)
    assert got.shape == (2, 5)
    assert_close("groups are apart", torch.stack([loss(x, y) for x, y in zip(a, b)]), got, 1e-12)
    assert loss(a.bfloat16(), b.bfloat16()).dtype == torch.float32
    assert torch.autograd.gradcheck(lambda x, y: loss(x, y).sum(), (a.requires_grad_(), b.requires_grad_()))
    with pytest.raises(UserError, match="of one shape"):
        loss(a, b[:, :4])
    again = PairLoss.from_dict(pair_examples()[name].to_dict())
    assert again == pair_examples()[name]


def test_impossible_temperature() -> None:
    with pytest.raises(UserError, match=r"MNR\.temperature"):
        MNR(temperature=0.0)


# Routers and labels: brief 34, first version ------------------------------------------------------------------------


def plan_of(logits: Tensor) -> Plan:
    probs = logits.softmax(-1)
    expert = probs.detach().argmax(-1, keepdim=True)
    return Plan(expert=expert, weight=probs.gather(1, expert), num_experts=2, probs=probs, logits=logits)


def test_specified_expert_of_brief_34() -> None:
    logits = torch.tensor([[1.0, 0.0], [2.0, 2.0], [9.0, 0.0]], dtype=torch.float64, requires_grad=True)
    loss = SpecifiedExpert(signal="label").build()
    assert loss.needs == ("label",)
    value = loss(plan_of(logits), label=torch.tensor([1, 0, -1]))
    assert float(value.detach()) == pytest.approx((math.log(1 + math.e) + math.log(2)) / 2)
    (gradient,) = torch.autograd.grad(value, logits)
    high = math.e / (1 + math.e) / 2
    assert_close("gradient", gradient, torch.tensor([[high, -high], [-0.25, 0.25], [0, 0]], dtype=torch.float64), 1e-12)
    with pytest.raises(UserError, match="names expert 2 of 2"):
        loss(plan_of(logits), label=torch.tensor([2, 0, 0]))


def test_mutual_information_of_brief_34_has_a_gradient() -> None:
    """-sum G log(G / (P_T P_E)), G = joint distribution of task and expert: here [[3/8, 1/8], [1/4, 1/4]]. The released
    loss is computed from detached numbers and cannot train the router."""
    p = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.5, 0.5], [0.5, 0.5]], dtype=torch.float64)
    logits = p.log().requires_grad_()
    value = MutualInformation(num_tasks=2, prior="counts").build()(plan_of(logits), task=torch.tensor([0, 0, 1, 1]))
    joint, expert = [[3 / 8, 1 / 8], [1 / 4, 1 / 4]], [5 / 8, 3 / 8]
    want = -sum(g * math.log(g / (0.5 * expert[e])) for row in joint for e, g in enumerate(row))
    assert float(value.detach()) == pytest.approx(want)
    (gradient,) = torch.autograd.grad(value, logits)
    assert float(gradient.abs().sum()) > 0.01
