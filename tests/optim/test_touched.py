"""Steps for touched experts only: gradients, norms, and what optimisers make of them."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moestro.core.errors import UserError
from moestro.core.plan import Plan
from moestro.experts.config import MLP, Gated
from moestro.optim import AdamW
from moestro.optim.clip import clip, grad_norm
from moestro.optim.touched import TouchedExperts, settle

E, D, TOUCHED = 6, 8, (1, 4)
BANKS = {"gated": Gated(width=12), "mlp": MLP(width=10, bias=True)}


class Model(nn.Module):
    """A linear map and a bank, of which two experts are met."""

    def __init__(self, config: Gated | MLP, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(D, D)
        self.bank = config.replace(sparse_grad=sparse).build(dim=D, num_experts=E)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        expert = torch.tensor(TOUCHED).expand(x.shape[0], 2)
        return self.bank.mixture(self.linear(x), Plan(expert=expert, weight=weight, num_experts=E, complete=True))


def pair(kind: str) -> tuple[Model, Model]:
    """The same model with full gradients and with those of touched experts."""
    return Model(BANKS[kind], False), Model(BANKS[kind], True)


def passes(model: Model, n: int = 1, seed: int = 1) -> None:
    torch.manual_seed(seed)
    for _ in range(n):
        x, weight = torch.randn(5, D), torch.rand(5, 2)
        model(x, weight).square().sum().backward()


@pytest.mark.parametrize("kind", BANKS)
@pytest.mark.parametrize("n", [1, 3])
def test_sparse_gradients_equal_full_ones(kind: str, n: int) -> None:
    full, sparse = pair(kind)
    passes(full, n)
    passes(sparse, n)
    settle(sparse.parameters())
    for (name, a), b in zip(full.named_parameters(), sparse.parameters()):
        assert a.grad is not None
        assert b.grad is not None
        assert b.grad.is_sparse == name.startswith("bank."), name
        if b.grad.is_sparse:
            assert b.grad.indices()[0].tolist() == list(TOUCHED)
            assert b.grad.values().shape == (2, *b.shape[1:])
        torch.testing.assert_close(b.grad.to_dense(), a.grad, rtol=1e-5, atol=1e-6)


def test_sparse_gradients_of_rows() -> None:
    full, sparse = pair("gated")
    from moestro.ops.rows import rows

    plan = Plan(expert=torch.tensor([[1], [4], [4]]), weight=torch.ones(3, 1), num_experts=E, complete=True)
    for model in (full, sparse):
        model.bank(torch.ones(3, D), rows(plan)).square().sum().backward()
    assert sparse.bank.down.grad.is_sparse
    torch.testing.assert_close(sparse.bank.down.grad.to_dense(), full.bank.down.grad)


@pytest.mark.parametrize("kind", BANKS)
def test_norm_and_clipping_equal_those_of_full_gradients(kind: str) -> None:
    full, sparse = pair(kind)
    passes(full, 2)
    passes(sparse, 2)
    settle(sparse.parameters())
    a, b = ([p.grad for p in m.parameters() if p.grad is not None] for m in (full, sparse))
    norm = float(grad_norm(a))
    assert float(grad_norm(b)) == pytest.approx(norm, rel=1e-6)
    assert clip(b, float(grad_norm(b)), norm / 7) == pytest.approx(clip(a, norm, norm / 7), rel=1e-6)
    for x, y in zip(a, b):
        torch.testing.assert_close(y.to_dense(), x, rtol=1e-5, atol=1e-7)


def test_clip_grad_norm_of_torch_through_the_bridge() -> None:
    full, sparse = pair("gated")
    bridge = TouchedExperts(sparse)
    passes(full)
    passes(sparse)
    bridge.collect()
    want = torch.nn.utils.clip_grad_norm_(full.parameters(), 0.1)
    torch.testing.assert_close(torch.nn.utils.clip_grad_norm_(bridge.parameters(), 0.1), want)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adagrad], ids=["sgd", "adagrad"])
def test_the_bridge_equals_full_updates_where_that_is_promised(make: type[torch.optim.Optimizer]) -> None:
    full, sparse = pair("gated")
    bridge = TouchedExperts(sparse)
    one, other = make(full.parameters(), lr=0.1), make(bridge.parameters(), lr=0.1)  # type: ignore[call-arg]
    for step in range(3):
        passes(full, seed=step)
        one.step()
        one.zero_grad()
        passes(sparse, seed=step)
        bridge.collect()
        other.step()
        bridge.clear()
    for a, b in zip(full.parameters(), sparse.parameters()):
        torch.testing.assert_close(b, a)


def test_adamw_leaves_untouched_experts_alone_and_equals_the_bridge() -> None:
    ours, theirs = Model(BANKS["gated"], True), Model(BANKS["gated"], True)
    before = ours.bank.down.detach().clone()
    bridge = TouchedExperts(theirs)
    config = AdamW(lr=0.01, weight_decay=0.1, clip=0.0)
    optimizer = config.build(ours)
    other = torch.optim.AdamW(
        [
            {"params": [theirs.linear.weight], "weight_decay": 0.1},
            {"params": [theirs.linear.bias], "weight_decay": 0.0},
            {"params": [t for t in bridge.parameters() if t.ndim == 2 and t is not theirs.linear.weight]},
        ],
        lr=0.01,
        weight_decay=0.1,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
    )
    for step in range(3):
        passes(ours, seed=step)
        settle(ours.parameters())
        optimizer.step(1.0)
        optimizer.clear()
        passes(theirs, seed=step)
        bridge.collect()
        other.step()
        bridge.clear()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
    untouched = [e for e in range(E) if e not in TOUCHED]
    assert torch.equal(ours.bank.down[untouched], before[untouched])
    assert not torch.equal(ours.bank.down[list(TOUCHED)], before[list(TOUCHED)])
    steps = optimizer.to_tensors()["bank.down/step"]
    assert steps.tolist() == [3.0 if e in TOUCHED else 0.0 for e in range(E)]


def test_adamw_goes_on_from_a_saved_state() -> None:
    whole, cut = Model(BANKS["gated"], True), Model(BANKS["gated"], True)
    first, second = (AdamW(lr=0.01).build(m) for m in (whole, cut))
    for step in range(4):
        if step == 2:
            state = second.to_tensors()
            second = AdamW(lr=0.01).build(cut)
            second.load(state)
        for model, optimizer in ((whole, first), (cut, second)):
            passes(model, seed=step)
            settle(model.parameters())
            optimizer.step(1.0)
            optimizer.clear()
    for a, b in zip(whole.parameters(), cut.parameters()):
        assert torch.equal(a, b)


def test_a_state_of_full_gradients_is_refused() -> None:
    full, sparse = pair("gated")
    one, other = AdamW().build(full), AdamW().build(sparse)
    passes(full)
    one.step(1.0)
    other.load(one.to_tensors())
    passes(sparse)
    with pytest.raises(UserError, match="full gradients"):
        other.step(1.0)


def test_a_model_that_was_moved_is_refused() -> None:
    model = Model(BANKS["gated"], True)
    bridge = TouchedExperts(model)
    model.double()
    with pytest.raises(UserError, match="moved"):
        bridge.collect()


def test_unequal_widths_compilation_and_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="unequal widths"):
        Gated(width=(3, 4), sparse_grad=True)
    model = Model(BANKS["gated"], True)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match="2 ranks"):
        passes(model)
    monkeypatch.undo()
    with pytest.raises(Exception, match="compiled"):
        torch.compile(model, backend="eager", fullgraph=True)(torch.randn(5, D), torch.rand(5, 2))
