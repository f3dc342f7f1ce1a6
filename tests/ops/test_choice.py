"""Recomputation keeps routing decisions: right under our checkpoint and torch's selective one, an error elsewhere.

The router of these tests is as bad as can be: its logits are ties but for noise that is new on every call, so that
taking a decision a second time takes another one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from moestro.core.errors import RecomputationError, UserError
from moestro.core.plan import Plan
from moestro.ops.choice import checkpoint, checkpoint_context, commit, in_backward, saving_choices
from moestro.ops.choice import commit as commit_module
from moestro.ops.combine import combine, gather_rows, table_weight
from moestro.ops.expert_mlp import gated_mlp
from moestro.ops.rows import rows
from moestro.testing.compare import assert_close, relative_error
from ops.ops_cases import generator, randn

T, D, E, F, K = 40, 6, 5, 7, 2
Commit = Callable[[Tensor], Tensor]


class Layer(nn.Module):
    """A routed layer; `commit` is what it does to its decision."""

    def __init__(self, commit: Commit) -> None:
        super().__init__()
        self.commit, self.calls = commit, 0
        self.router = nn.Parameter(torch.zeros(E, D))
        self.gate_up = nn.Parameter(randn(E, 2 * F, D, seed=1))
        self.down = nn.Parameter(randn(E, D, F, seed=2))
        self.chosen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        noise = torch.randn(T, E, generator=generator(self.calls)) * 1e-7
        probs = torch.softmax(x @ self.router.t() + noise, -1)
        expert = self.commit(torch.topk(probs.detach() + noise, K).indices)
        self.chosen.append(expert)
        weight = torch.stack([(probs * nn.functional.one_hot(e, E)).sum(1) for e in expert.unbind(1)], 1)
        plan = Plan(expert=expert, weight=weight, num_experts=E, complete=True)
        index = rows(plan)
        out = gated_mlp(gather_rows(x, index), self.gate_up, self.down, index.offsets)
        return x + combine(out, table_weight(plan, index), index)


Run = Callable[[nn.Module, Tensor], Tensor]


def prefer_recompute(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


def save_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op == torch.ops.aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE


def selective(policy: Callable[..., CheckpointPolicy]) -> Run:
    context = functools.partial(create_selective_checkpoint_contexts, policy)
    return lambda layer, x: torch_checkpoint(layer, x, use_reentrant=False, context_fn=context)


SAVING: dict[str, Run] = {
    "moestro.checkpoint": checkpoint,
    "context for torch": lambda layer, x: torch_checkpoint(
        layer, x, use_reentrant=False, context_fn=checkpoint_context
    ),
    "selective": selective(saving_choices(prefer_recompute)),
    "selective, products saved": selective(saving_choices(save_products)),
}
FORGETTING: dict[str, Run] = {
    "not reentrant": lambda layer, x: torch_checkpoint(layer, x, use_reentrant=False),
    "reentrant": lambda layer, x: torch_checkpoint(layer, x, use_reentrant=True),
    "selective": selective(prefer_recompute),
}


def gradients(run: Run, commit: Commit, layers: int = 2) -> tuple[dict[str, Tensor], list[Layer]]:
    """Gradients of input and parameters of a stack of layers, each run by `run`."""
    stack = [Layer(commit) for _ in range(layers)]
    x = randn(T, D, seed=3).requires_grad_()
    h = x
    for layer in stack:
        h = run(layer, h)
    h.backward(randn(T, D, seed=4))
    found = {f"{i}.{n}": p.grad for i, layer in enumerate(stack) for n, p in layer.named_parameters()}
    return {"x": x.grad, **found}, stack  # type: ignore[dict-item]


def plainly(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


@pytest.mark.parametrize("how", SAVING)
def test_gradients_are_those_without_checkpointing(how: str) -> None:
    want, _ = gradients(plainly, commit)
    got, stack = gradients(SAVING[how], commit)
    for layer in stack:
        assert layer.calls == 2  # it did run again,
        assert torch.equal(layer.chosen[0], layer.chosen[1])  # and read its decision instead of taking it
    for name, value in want.items():
        assert_close(f"gradient of {name}", got[name], value)


@pytest.mark.parametrize("how", ["not reentrant", "selective", "reentrant"])
def test_without_a_commit_they_are_silently_wrong(how: str) -> None:
    """The check above can fail: this is what a router that commits nothing does under each checkpoint."""
    want, _ = gradients(plainly, lambda choice: choice)
    got, stack = gradients(FORGETTING[how], lambda choice: choice)
    assert not torch.equal(stack[0].chosen[0], stack[0].chosen[1])
    errors = {name: relative_error(got[name], value) for name, value in want.items()}
    assert min(errors.values()) > 0.1, errors


@pytest.mark.parametrize("how", ["moestro.checkpoint", "selective"])
def test_our_checkpoint_cannot_help_a_router_that_commits_nothing(how: str) -> None:
    want, _ = gradients(plainly, lambda choice: choice)
    got, _ = gradients(SAVING[how], lambda choice: choice)
    assert relative_error(got["x"], want["x"]) > 0.1


@pytest.mark.parametrize("how", FORGETTING)
def test_elsewhere_it_is_an_error_that_names_the_remedy(how: str) -> None:
    with pytest.raises(RecomputationError, match=r"moestro\.checkpoint\(fn") as caught:
        gradients(FORGETTING[how], commit)
    for word in ("context_fn", "moestro.checkpoint_context", "gradient_checkpointing_enable", "use_reentrant"):
        assert word in str(caught.value)


def test_decisions_are_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op runs once per layer, in the forward pass: what recomputation reads was saved."""
    taken: list[bool] = []

    def spy() -> bool:
        taken.append(in_backward())
        return False

    module = __import__("sys").modules[commit_module.__module__]
    monkeypatch.setattr(module, "in_backward", spy)
    gradients(checkpoint, commit, layers=3)
    assert taken == [False] * 3
    taken.clear()
    gradients(FORGETTING["not reentrant"], commit, layers=3)
    assert sorted(taken) == [False] * 3 + [True] * 3


def test_the_rest_is_recomputed() -> None:
    """Only decisions are kept: no activation of the layer outlives its forward pass."""

    def held(run: Run) -> int:
        layer, sizes = Layer(commit), []
        known = {p.untyped_storage().data_ptr() for p in layer.parameters()}

        def pack(t: Tensor) -> Tensor:
            if t.untyped_storage().data_ptr() not in known and t.is_floating_point():
                sizes.append(t.numel())
            return t

        x = randn(T, D).requires_grad_()
        known.add(x.untyped_storage().data_ptr())
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            run(layer, x)
        return sum(sizes)

    assert held(plainly) > T * K * F
    assert held(checkpoint) == 0


def test_nested_and_repeated() -> None:
    """One layer used twice inside one checkpoint: two decisions, each read in its place."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer(commit)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    results = []
    for run in (plainly, checkpoint):
        model, x = Twice(), randn(T, D).requires_grad_()
        run(model, x).square().sum().backward()
        assert not torch.equal(model.layer.chosen[0], model.layer.chosen[1])
        if run is checkpoint:
            assert torch.equal(torch.stack(model.layer.chosen[:2]), torch.stack(model.layer.chosen[2:]))
        results.append([x.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*results):
        assert a is not None
        assert_close("gradient", b, a)


def test_functions_with_keywords_and_several_results() -> None:
    def function(x: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        chosen = commit((x > 0).long())
        return x * chosen * scale, chosen

    x = randn(5).requires_grad_()
    y, chosen = checkpoint(function, x, scale=3.0)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 3.0 * chosen)


def test_evaluation_needs_no_checkpoint() -> None:
    with torch.no_grad():
        y = checkpoint(Layer(commit), randn(T, D))
    assert not y.requires_grad
    assert not in_backward()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_commit_is_a_copy(dtype: torch.dtype) -> None:
    choice = torch.arange(6).view(2, 3).to(dtype)
    kept = commit(choice)
    assert torch.equal(kept, choice)
    assert kept.dtype == dtype
    assert kept.data_ptr() != choice.data_ptr()
    torch.library.opcheck(torch.ops.moestro.commit.default, (choice,), test_utils=("test_schema", "test_faketensor"))


def test_only_decisions_can_be_committed() -> None:
    with pytest.raises(UserError, match="integers or booleans"):
        commit(torch.rand(3))
