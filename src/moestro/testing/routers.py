"""`check_router`: what must hold for anything that writes plans."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from ..core.carry import Carry, Replay
from ..core.errors import RecomputationError
from ..core.plan import AnyPlan, Dense, ExpertChoice, Plan, demand
from ..core.signals import Signals
from ..ops.choice import checkpoint
from .attend import causal_map
from .compare import relative_error

__all__ = ["check_router", "signals_for"]


def signals_for(batch: int, length: int, *, seed: int = 7, padding: int = 0, num_labels: int = 4) -> Signals:
    """Signals for `batch` sequences of `length` tokens; the last `padding` tokens of every sequence are invalid."""
    T = batch * length
    position = torch.arange(length).repeat(batch)
    valid = (position < length - padding) if padding else None
    segment = torch.arange(batch).repeat_interleave(length)
    return Signals(
        valid=valid,
        attend=causal_map(segment, valid),
        position=position,
        segment=segment,
        token=(torch.arange(T) * 7) % 50,
        task=torch.zeros(T, dtype=torch.int64),
        label=(torch.arange(T) * 3) % num_labels,
        unit_id=torch.arange(T),
        seed=seed,
        progress=0.5,
    )


def check_router(
    make: Callable[[], nn.Module], *, dim: int = 16, num_experts: int = 8, batch: int = 3, length: int = 10
) -> None:
    """Run every check on fresh routers from `make()`.

    Plans well formed; padding neither routed nor looked at; logits in fp32 whatever the model's dtype; the same plan
    for the same seed; no plan changed by later tokens where the router says `causal`; the decision saved by
    `moestro.checkpoint` and refused under any other; weights that reach the router's parameters; replay; round trip.
    """
    router = _fresh(make)
    x = _input(batch * length, dim)
    signals = signals_for(batch, length)
    plan = _plan(router, x, signals)
    _check_shape(plan, x, num_experts)
    _check_same_twice(router, x, signals)
    _check_padding(router, x, batch, length)
    _check_precision(router, x, signals)
    if getattr(router, "causal", True):
        check_causal(router, x, signals, length)
    _check_recomputation(router, x, signals)
    _check_gradient(router, x, signals)
    _check_replay(router, x, signals)
    _check_round_trip(make, x, signals)


def _fresh(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    router = make()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in router.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return router


def _input(T: int, dim: int, seed: int = 2) -> Tensor:
    return torch.randn(T, dim, generator=torch.Generator().manual_seed(seed))


def _plan(router: nn.Module, x: Tensor, signals: Signals, carry: Carry | None = None) -> AnyPlan:
    return router(x, signals, carry or Carry())[0]


def _tables(plan: AnyPlan) -> tuple[Tensor, Tensor]:
    """[T, E] bool: who goes where; [T, E] float64: with which weight."""
    T = plan.num_units if isinstance(plan, ExpertChoice) else plan.weight.shape[0]
    routed, weight = plan.routed(), plan.weight.detach().double()
    if isinstance(plan, Dense):
        return routed, weight
    if isinstance(plan, Plan):
        unit = torch.arange(T)[:, None].expand_as(plan.expert)[routed]
        expert = plan.expert[routed]
    else:
        unit = plan.unit[routed]
        expert = torch.arange(plan.num_experts)[None, :, None].expand_as(plan.unit)[routed]
    chosen = torch.zeros(T, plan.num_experts, dtype=torch.bool)
    chosen[unit, expert] = True
    weights = torch.zeros(T, plan.num_experts, dtype=torch.float64)
    return chosen, weights.index_put_((unit, expert), weight[routed], accumulate=True)


def _same(a: AnyPlan, b: AnyPlan, what: str, units: Tensor | None = None) -> None:
    (chosen_a, ta), (chosen_b, tb) = _tables(a), _tables(b)
    if units is not None:
        chosen_a, chosen_b, ta, tb = chosen_a[units], chosen_b[units], ta[units], tb[units]
    differing = (chosen_a != chosen_b).any(dim=1)
    if bool(differing.any()):
        raise AssertionError(f"{what}: {int(differing.sum())} units chose other experts")
    worst = float((ta - tb).abs().max()) if ta.numel() else 0.0
    if not worst < 1e-5:
        raise AssertionError(f"{what}: weights differ by up to {worst:.2e}")


def _check_shape(plan: AnyPlan, x: Tensor, num_experts: int) -> None:
    plan.check()
    T = plan.num_units if isinstance(plan, ExpertChoice) else plan.weight.shape[0]
    if x.shape[0] != T:
        raise AssertionError(f"plan: speaks of {T} units, the input has {x.shape[0]}")
    if plan.num_experts != num_experts:
        raise AssertionError(f"plan: num_experts is {plan.num_experts}, not {num_experts}")
    if not int(demand(plan).sum()):
        raise AssertionError("plan: nobody chose a real expert")


def _check_same_twice(router: nn.Module, x: Tensor, signals: Signals) -> None:
    _same(_plan(router, x, signals), _plan(router, x, signals), "two calls with one seed")


def _check_padding(router: nn.Module, x: Tensor, batch: int, length: int) -> None:
    signals = signals_for(batch, length, padding=3)
    assert signals.valid is not None
    plan = _plan(router, x, signals)
    plan.check()
    routed, _ = _tables(plan)
    if bool(routed[~signals.valid].any()):
        raise AssertionError("padding: an invalid unit was routed")
    loud = torch.where(signals.valid[:, None], x, torch.full_like(x, 50.0))
    other = _plan(router, loud, signals)
    _same(plan, other, "padding: valid units looked at the content of padding", signals.valid)
    if not torch.equal(demand(plan), demand(other)):
        raise AssertionError("padding: the content of padding is counted")


def _check_precision(router: nn.Module, x: Tensor, signals: Signals) -> None:
    """Logits of a router cast to bf16 equal those of a float64 router with the same (rounded) parameters and input."""
    low = copy.deepcopy(router).to(torch.bfloat16)
    exact = copy.deepcopy(low).to(torch.float64)
    x16 = x.to(torch.bfloat16)
    plan = _plan(low, x16, signals)
    if plan.weight.dtype != torch.float32:
        raise AssertionError(f"precision: weights are {plan.weight.dtype} for a bf16 model, not fp32")
    want = _plan(exact, x16.double(), signals)
    if plan.logits is None or want.logits is None:
        return
    if plan.logits.dtype != torch.float32:
        raise AssertionError(f"precision: logits are {plan.logits.dtype} for a bf16 model, not fp32")
    error = relative_error(plan.logits, want.logits)
    if not error < 1e-5:
        raise AssertionError(f"precision: logits of a bf16 model are off by {error:.1e} relative to float64")


def check_causal(router: nn.Module, x: Tensor, signals: Signals, length: int) -> None:
    """Change every token from some t on: no plan before t may change, in training and in evaluation."""
    position = torch.arange(x.shape[0]) % length
    for training in (True, False):
        router.train(training)
        before = _plan(router, x, signals)
        for t in (1, length // 2, length - 1):
            # Only the last sequence changes: units are ordered, so everything before it is the past as well.
            late = (position >= t) & (torch.arange(x.shape[0]) >= x.shape[0] - length)
            changed = torch.where(late[:, None], -x.flip(0), x)
            after = _plan(router, changed, signals)
            mode = "training" if training else "evaluation"
            _same(before, after, f"causality in {mode}: a change at position {t} reached the past", ~late)
    router.train(True)


def _check_recomputation(router: nn.Module, x: Tensor, signals: Signals) -> None:
    """Under `moestro.checkpoint` the decision is read back even if the recomputed input differs; elsewhere an error."""
    seen: list[Tensor] = []
    noise = [torch.zeros_like(x), *(3 * _input(*x.shape, seed=s) for s in (8, 9))]

    def layer(x: Tensor) -> Tensor:
        plan = _plan(router, x + noise[len(seen)], signals)
        seen.append(_tables(plan)[0])
        return (x * plan.weight.sum() + x).square().sum()

    if isinstance(_plan(router, x, signals), Dense):
        return
    grad_x = x.clone().requires_grad_()
    checkpoint(layer, grad_x).backward()
    if len(seen) != 2:
        raise AssertionError("recomputation: the checkpointed function did not run twice; the check could not look")
    if not torch.equal(seen[0], seen[1]):
        raise AssertionError("recomputation: tokens were routed again to other experts")
    try:
        seen.clear()
        torch_checkpoint(layer, x.clone().requires_grad_(), use_reentrant=False).backward()
    except RecomputationError:
        return
    raise AssertionError("recomputation: a checkpoint that saves no decisions was not refused")


def _check_gradient(router: nn.Module, x: Tensor, signals: Signals) -> None:
    trained = [(n, p) for n, p in router.named_parameters() if p.requires_grad]
    plan = _plan(router, x, signals)
    sources = [t for t in (plan.weight, plan.probs, plan.logits) if t is not None and t.requires_grad]
    if not trained:
        return
    if not sources:
        raise AssertionError("gradient: neither weights nor probabilities depend on the router's parameters")
    mixed = sum((t.double() * torch.sin(torch.arange(t.numel()).double().reshape(t.shape))).sum() for t in sources)
    grads = torch.autograd.grad(mixed, [p for _, p in trained], allow_unused=True)  # type: ignore[arg-type]
    if all(g is None or not bool(g.abs().sum() > 0) for g in grads):
        raise AssertionError("gradient: no parameter of the router receives any")
    for (name, _), g in zip(trained, grads):
        if g is not None and not bool(torch.isfinite(g).all()):
            raise AssertionError(f"gradient: {name} receives a NaN or an infinity")


def _check_replay(router: nn.Module, x: Tensor, signals: Signals) -> None:
    """A replayed plan fixes the choice for another input; for the same input it gives the same weights."""
    plan = _plan(router, x, signals)
    if not isinstance(plan, Plan):
        return
    again = _plan(router, x, signals, Carry(own={"": Replay(plan)}))
    _same(plan, again, "replay of the same input")
    moved = _plan(router, x.flip(0), signals, Carry(own={"": Replay(plan)}))
    assert isinstance(moved, Plan)
    if not torch.equal(moved.expert, plan.expert):
        raise AssertionError("replay: another input changed the replayed choice")
    if plan.weight.requires_grad and not moved.weight.requires_grad:
        raise AssertionError("replay: weights lost their gradient")


def _check_round_trip(make: Callable[[], nn.Module], x: Tensor, signals: Signals) -> None:
    router = _fresh(make)
    other = make()
    other.load_state_dict(router.state_dict())
    _same(_plan(router, x, signals), _plan(other, x, signals), "round trip through state_dict")
