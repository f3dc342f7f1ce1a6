"""Plain experts with a branch that starts at one (34, first version)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moestro.core.plan import Plan
from moestro.experts.config import MLP, GatedExtension
from moestro.ops.expert_mlp import Spec, explain
from moestro.ops.rows import rows
from moestro.testing.compare import assert_close
from moestro.testing.experts import plan_for


def banks(bias: bool) -> tuple[torch.nn.Module, torch.nn.Module]:
    plain = MLP(width=10, bias=bias).build(dim=6, num_experts=3)
    made = GatedExtension(width=10, bias=bias).build(dim=6, num_experts=3)
    made.load_state_dict(plain.state_dict(), strict=False)
    return plain, made


def gelu(x: float) -> float:
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def test_gated_extension_of_brief_34_by_hand() -> None:
    """W_down(GELU(W_up x) * (W_new x + b_new)) with D = F = 1: up 2, new 3, b_new -1, down 5."""
    bank = GatedExtension(width=1).build(dim=1, num_experts=1).double()
    with torch.no_grad():
        for name, value in {"up": 2.0, "new": 3.0, "new_bias": -1.0, "down": 5.0}.items():
            getattr(bank, name).fill_(value)
    x = torch.tensor([[0.5], [-1.0]], dtype=torch.float64)
    plan = Plan(expert=torch.zeros(2, 1, dtype=torch.int64), weight=torch.ones(2, 1), num_experts=1, complete=True)
    want = [5 * gelu(2 * t) * (3 * t - 1) for t in (0.5, -1.0)]
    assert_close("rows", bank(x, rows(plan))[:, 0], torch.tensor(want, dtype=torch.float64), 1e-12)


def test_it_starts_as_the_plain_experts_and_learns_its_branch() -> None:
    x, plan = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), plan_for(40, 3, 2)
    for bias in (False, True):
        plain, made = banks(bias)
        for run in ("mixture", "forward"):
            want, got = (_run(bank, x, plan, run) for bank in (plain, made))
            assert_close(f"{run}, bias={bias}", got, want, 1e-6)
        _run(made, x, plan, "mixture").square().sum().backward()
        assert all(bool(p.grad.abs().sum() > 0) for p in made.parameters())  # type: ignore[union-attr]
        assert made.per_row()[1] == plain.per_row()[1] * 3 // 2  # type: ignore[operator]


def _run(bank: torch.nn.Module, x: Tensor, plan: Plan, how: str) -> Tensor:
    if how == "mixture":
        return bank.mixture(x, plan)  # type: ignore[operator]
    index = rows(plan)
    return bank(x[index.unit], index)


def test_who_computes_it_is_said() -> None:
    said = explain(Spec(device="cpu", dtype=torch.float32, rows=64, dim=16, width=8, experts=4, biased=True))
    assert "gated biased experts" in said
    assert any(line.startswith("  native:") for line in said.splitlines())
