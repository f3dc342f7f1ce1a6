"""Every registered router compiles as one graph, and decides there as it does without a compiler."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from moestro.core.signals import Signals
from moestro.routers import examples
from moestro.testing.attend import causal_map

T, D, E = 6, 12, 8


@pytest.mark.parametrize("name", examples())
def test_a_router_is_one_graph(name: str) -> None:
    """Backend "eager" runs what was traced with torch's own kernels: equal to the last bit."""
    torch._dynamo.reset()  # one code object serves all routers
    router = examples()[name].build(dim=D, num_experts=E).train()
    compiled = torch.compile(router, backend="eager", fullgraph=True)
    units = torch.arange(T)
    signals = Signals(
        seed=5,
        unit_id=units,
        position=units % 3,
        segment=units // 3,
        task=units % 4,
        label=torch.tensor([3, 0, 7, 1, -1, 3]),
        attend=causal_map(units // 3),
    )
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(0))
    got, want = compiled(x, signals)[0], router(x, signals)[0]
    assert type(got) is type(want)
    for field in dataclasses.fields(want):
        a, b = getattr(got, field.name), getattr(want, field.name)
        if isinstance(b, Tensor):
            assert torch.equal(a, b), field.name
        elif field.name not in ("extra", "meta"):
            assert a == b, field.name
    assert {n: t.tolist() for n, t in got.extra.items()} == {n: t.tolist() for n, t in want.extra.items()}


def test_a_compiled_router_refuses_a_label_that_is_no_expert() -> None:
    torch._dynamo.reset()
    router = torch.compile(examples()["label"].build(dim=D, num_experts=E), backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="signals.label names an expert"):
        router(torch.zeros(T, D), Signals(label=torch.full((T,), E)))
