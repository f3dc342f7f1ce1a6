"""Muon: every expert and every fused part by itself, as torch's Muon and a float64 oracle step it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moestro.cli.override import override
from moestro.core.errors import UserError
from moestro.core.params import describe
from moestro.experts.config import Gated
from moestro.models.examples import examples
from moestro.ops.rows import rows as derive
from moestro.optim import AdamW, Muon, Optimizer
from moestro.optim.muon import MuonOptimizer, as_matrices, from_matrices, orthogonalised
from moestro.testing.compare import assert_close
from moestro.testing.experts import plan_for
from moestro.testing.optimizers import check_optimizer
from moestro.train.observe import StepInfo
from moestro.train.run import run
from train.train_cases import Steps, rows, tiny


def oracle(weights: list[Tensor], grads: list[list[Tensor]], lr: float, decay: float, config: Muon) -> list[Tensor]:
    """Each matrix alone, in float64, term by term."""
    out = []
    for i, weight in enumerate(weights):
        w, m = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
        for step in grads:
            g = step[i].double()
            m = config.momentum * m + (1 - config.momentum) * g
            u = config.momentum * m + (1 - config.momentum) * g if config.nesterov else m
            x = u / (u.square().sum().sqrt() + 1e-7)
            x = x.T if x.shape[0] > x.shape[1] else x
            for _ in range(config.iterations):
                s = x @ x.T
                x = 3.4445 * x - 4.7750 * s @ x + 2.0315 * s @ s @ x
            x = x.T if u.shape[0] > u.shape[1] else x
            A, B = u.shape
            scale = 0.2 * math.sqrt(max(A, B)) if config.scale == "match_rms" else math.sqrt(max(1, A / B))
            w = (1 - lr * decay) * w - lr * scale * x
        out.append(w)
    return out


def pieces(bank: nn.Module) -> dict[str, Tensor]:
    """Every expert's gate, up and down, [F, D] or [D, F], read without the code under test."""
    F = bank.down.shape[2]
    found = {}
    for e in range(bank.down.shape[0]):
        found |= {f"gate {e}": bank.gate_up[e, :F], f"up {e}": bank.gate_up[e, F:], f"down {e}": bank.down[e]}
    return {n: t.detach().clone() for n, t in found.items()}


def gradients(bank: nn.Module, steps: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{n: torch.randn(p.shape, generator=generator) for n, p in bank.named_parameters()} for _ in range(steps)]


def train(bank: nn.Module, optimizer: MuonOptimizer, grads: list[dict[str, Tensor]]) -> None:
    for step in grads:
        for n, p in bank.named_parameters():
            p.grad = step[n].clone()
        optimizer.step(1.0)
        optimizer.clear()


@pytest.mark.parametrize("scale", ["match_rms", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_every_expert_gate_and_up_equal_the_oracle_in_float64(scale: str, nesterov: bool) -> None:
    torch.manual_seed(0)
    bank = Gated(width=5).build(dim=8, num_experts=3)
    before, grads = pieces(bank), gradients(bank, 3)
    config = Muon(lr=0.02, weight_decay=0.1, scale=scale, nesterov=nesterov)
    train(bank, config.build(bank), grads)
    held = [pieces(_as_bank(g)) for g in grads]
    want = oracle(list(before.values()), [list(h.values()) for h in held], 0.02, 0.1, config)
    for name, value in zip(before, want):
        assert_close(name, pieces(bank)[name], value, 1e-5)


def _as_bank(tensors: dict[str, Tensor]) -> nn.Module:
    module = nn.Module()
    for n, t in tensors.items():
        setattr(module, n, t)
    return module


def test_every_expert_equals_torch_muon() -> None:
    """torch's takes matrices only and computes in bf16; it is given each expert's gate, up and down."""
    torch.manual_seed(0)
    bank = Gated(width=16).build(dim=24, num_experts=3)
    before, grads = pieces(bank), gradients(bank, 2)
    train(bank, Muon(lr=0.02, weight_decay=0.1).build(bank), grads)
    for name, value in before.items():
        p = nn.Parameter(value.clone())
        other = torch.optim.Muon([p], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for g in grads:
            p.grad = pieces(_as_bank(g))[name]
            other.step()
        assert_close(name, pieces(bank)[name] - value, p.detach() - value, 2e-2)


def test_orthogonalised_is_near_the_polar_factor() -> None:
    size = torch.tensor([1e-6, 1, 30, 1e6])[:, None, None]
    x = torch.randn(4, 12, 30, generator=torch.Generator().manual_seed(0)) * size
    values = torch.linalg.svdvals(orthogonalised(x))
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.25


def test_the_update_is_as_large_as_adamws() -> None:
    """match_rms: the root mean square of an update is 0.2, less what the iteration leaves out, for any shape."""
    for A, B in ((64, 64), (32, 128), (128, 32)):
        model = Gated(width=A).build(dim=B, num_experts=2)
        optimizer = Muon(lr=1.0, weight_decay=0.0).build(model)
        before = model.gate_up.detach().clone()
        train(model, optimizer, gradients(model, 1))
        rms = float((model.gate_up.detach() - before).square().mean().sqrt())
        assert 0.15 < rms < 0.22


@pytest.mark.parametrize("config", [Muon(lr=0.1), Muon(lr=0.1, scale="original", nesterov=False), AdamW(lr=0.1)])
def test_stacks_are_stepped_as_experts(config: Optimizer) -> None:
    check_optimizer(lambda model: config.build(model))


def test_who_is_stepped_by_what() -> None:
    model = examples()["shared"].build()
    optimizer = Muon().build(model)
    infos = describe(model)
    assert {infos[n].role for n in optimizer.matrices} == {"attention", "expert", "shared_expert"}
    assert {infos[n].role for n in optimizer.rest.parameters} == {"embedding", "head", "norm", "router"}
    assert set(optimizer.matrices) | set(optimizer.rest.parameters) == set(infos)


def test_matrices_come_back_as_they_were() -> None:
    for name in ("moe", "mixed", "shared"):
        model = examples()[name].build()
        infos = describe(model)
        for n, m in Muon().build(model).matrices.items():
            there = as_matrices(m.parameter, infos[n])
            assert torch.equal(from_matrices(there, infos[n], m.parameter.shape), m.parameter)


def test_the_state_goes_on_to_the_last_bit() -> None:
    def steps(model: nn.Module, optimizer: MuonOptimizer, numbers: range) -> None:
        for i in numbers:
            tokens = torch.randint(0, 37, (2, 9), generator=torch.Generator().manual_seed(i))
            nats, number, _, trail = model.loss(tokens, tokens)
            (nats / number + trail.loss()).backward()
            optimizer.step(1.0)
            optimizer.clear()

    whole, half, resumed = (examples()["moe"].build() for _ in range(3))
    steps(whole, Muon().build(whole), range(4))
    first = Muon().build(half)
    steps(half, first, range(2))
    resumed.load_state_dict(half.state_dict())
    second = Muon().build(resumed)
    state = {n: t.clone() for n, t in first.to_tensors().items()}
    second.load(state)
    steps(resumed, second, range(2, 4))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters()))
    with pytest.raises(UserError, match="no momentum"):
        second.load({n: t for n, t in state.items() if not n.endswith("layers.0.ffn.experts.down/momentum")})
    with pytest.raises(UserError, match="has shape"):
        second.load(state | {"layers.0.ffn.experts.down/momentum": torch.zeros(3)})
    with pytest.raises(UserError, match="fits no parameter"):
        second.load(state | {"other/momentum": torch.zeros(3)})


def test_untouched_experts_stay_as_they_are() -> None:
    """With sparse_grad: touched experts as if alone, others to the bit; the full gradient moves them by decay only."""
    torch.manual_seed(0)
    dense, sparse = (Gated(width=4, sparse_grad=s).build(dim=6, num_experts=4) for s in (False, True))
    sparse.load_state_dict(dense.state_dict())
    before = dense.down.detach().clone()
    x, plan = torch.randn(9, 6), plan_for(9, 4, 2, starved=(1,))
    for bank in (dense, sparse):
        optimizer = Muon(lr=0.1, weight_decay=0.1).build(bank)
        (bank(x[derive(plan).unit], derive(plan)).square().sum()).backward()
        optimizer.step(1.0)
    assert sparse.down.grad.is_sparse
    assert torch.equal(sparse.down[1], before[1])
    assert_close("untouched", dense.down[1], before[1] * 0.99, 1e-6)
    for e in (0, 2, 3):
        assert_close(f"expert {e}", sparse.down[e], dense.down[e], 1e-5)


def test_errors() -> None:
    with pytest.raises(UserError, match="no trainable matrix"):
        Muon().build(nn.LayerNorm(3))
    with pytest.raises(UserError, match=r"Muon\.momentum"):
        Muon(momentum=1.0)


class Cut(Exception):
    """Stands for a crash."""


def test_it_trains_from_the_command_line_and_resumes_to_the_last_bit(tmp_path: Path) -> None:
    def cut(info: StepInfo) -> None:
        if info.step == 4:
            raise Cut

    config = override(tiny(tmp_path, steps=6, eval_every=3), ["optimizer=optim.Muon", "optimizer.lr=0.003"])
    assert config.optimizer == Muon(lr=0.003)
    assert run(config, out=tmp_path / "whole").complete
    with pytest.raises(Cut):
        run(config, out=tmp_path / "cut", progress=Steps(cut))
    run(out=tmp_path / "cut", resume=True)
    assert rows(tmp_path / "whole", "step") == rows(tmp_path / "cut", "step")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]
    other = run(config.replace(optimizer=AdamW(lr=0.003)), out=tmp_path / "other")
    assert other.complete
    assert rows(tmp_path / "other", "step") != rows(tmp_path / "whole", "step")
