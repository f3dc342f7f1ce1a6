"""torch.compile takes a routed layer whole, and gives what the oracle gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.core.signals import Signals
from moestro.dispatch import Capacity
from moestro.experts import MLP, Experts, Gated
from moestro.ops.expert_mlp import FEW
from moestro.routers.examples import examples as router_examples
from moestro.testing.compare import assert_close

from .layer_cases import D, build, tokens

WIDTHS = (10, 3, 1, 7, 12, 5, 9, 2)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def step(layer: Any, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    y, _, trail = layer(x, Signals(valid=valid))
    return y, trail.loss()


def train(layer: Any, run: Any, x: Tensor, *rest: Any) -> dict[str, Tensor]:
    """y and every gradient after one pass."""
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    y, loss = run(layer, leaf, *rest)
    (y.float().square().sum() + loss).backward()
    grads = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    assert leaf.grad is not None
    return {"y": y.detach(), "x": leaf.grad, **grads}


@pytest.mark.parametrize(
    ("experts", "dtype", "backend", "padded"),
    [
        (Gated(width=10), torch.float32, "aot_eager", False),
        (Gated(width=WIDTHS), torch.float32, "aot_eager", True),
        (Gated(width=WIDTHS), torch.bfloat16, "aot_eager", False),
        (MLP(width=9, bias=True), torch.bfloat16, "inductor", True),
        (MLP(width=9), torch.float32, "aot_eager", False),
    ],
)
def test_training(experts: Experts, dtype: torch.dtype, backend: str, padded: bool) -> None:
    """Without a break, forward and backward; padding makes the number of rows depend on data."""
    layer, x = build(experts=experts).to(dtype), tokens().to(dtype)
    valid = torch.arange(x.shape[0] * x.shape[1]) % 6 < 4 if padded else None
    got = train(layer, torch.compile(step, fullgraph=True, backend=backend), x, valid)
    want = train(layer.double(), step, x.double(), valid)
    assert set(got) == set(want)
    for name, value in want.items():
        assert_close(name, got[name].float(), value, 1e-5 if dtype == torch.float32 else 3e-2)


def test_tables_of_a_fixed_size() -> None:
    """The capacity exchange, where a dropped choice makes the number of rows depend on data."""
    router = router_examples()["capacity"]
    layer, x = build(router=router, exchange=Capacity()), tokens()
    got = train(layer, torch.compile(step, fullgraph=True, backend="aot_eager"), x)
    for name, value in train(layer.double(), step, x.double()).items():
        assert_close(name, got[name], value, 1e-5)


@pytest.mark.parametrize(("T", "dtype"), [(1, torch.float32), (FEW + 1, torch.bfloat16)])
def test_evaluation(T: int, dtype: torch.dtype) -> None:
    """Few tokens, which are read from the table, and many."""
    layer = build().to(dtype).eval()
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        got, _ = torch.compile(step, fullgraph=True, backend="aot_eager")(layer, x)
        want, _ = step(layer.double(), x.double())
    assert_close("y", got.float(), want, 1e-5 if dtype == torch.float32 else 3e-2)


def test_other_numbers_of_tokens_are_not_compiled_again_and_again() -> None:
    layer = build()
    run = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=False):
        for T in (40, 56):  # the second number makes it a symbol
            train(layer, run, torch.randn(T, D))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for T in (33, 64, 100):
            x = torch.randn(T, D, generator=torch.Generator().manual_seed(T))
            got = train(layer, run, x)
            for name, value in train(layer, step, x).items():
                assert_close(f"{T}: {name}", got[name], value, 1e-5)
