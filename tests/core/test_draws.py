"""Stateless draws: same unit, same draw; good distribution; equal for ints and tensors."""

from __future__ import annotations

import pytest
import torch

from moestro.core import draws


def test_a_unit_draws_the_same_whatever_the_batch():
    unit = torch.arange(1000)
    whole = draws.uniform(11, unit, 4)
    assert torch.equal(whole[300:400], draws.uniform(11, unit[300:400], 4))
    assert not torch.equal(whole, draws.uniform(12, unit, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_is_uniform_and_uncorrelated(dtype):
    u = draws.uniform(5, torch.arange(100_000), 4, dtype=dtype).double()
    assert u.min() > 0
    assert u.max() < 1
    assert (u.mean(0) - 0.5).abs().max() < 0.005
    counts = torch.histc(u[:, 0], bins=64, min=0, max=1)
    chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert 25 < chi2 < 115, "63 degrees of freedom, five sigma"
    assert (torch.corrcoef(u.T) - torch.eye(4)).abs().max() < 0.016
    assert torch.corrcoef(torch.stack([u[:-1, 0], u[1:, 0]]))[0, 1].abs() < 0.016


def test_normal_and_gumbel_have_their_moments():
    unit = torch.arange(200_000)
    n = draws.normal(3, unit, 1).double()
    assert abs(float(n.mean())) < 0.01
    assert abs(float(n.std()) - 1) < 0.01
    g = draws.gumbel(3, unit, 1).double()
    assert abs(float(g.mean()) - 0.5772) < 0.02
    assert abs(float(g.var()) - torch.pi**2 / 6) < 0.05


def test_permutation_is_one_and_depends_on_the_seed():
    p = draws.permutation(1, 500)
    assert torch.equal(p.sort().values, torch.arange(500))
    assert not torch.equal(p, draws.permutation(2, 500))


def test_fold_agrees_for_ints_and_tensors_and_separates_names():
    for seed in (0, 1, 2**40 + 7):
        assert int(draws.fold(torch.tensor(seed), "layers.1")) == draws.fold(seed, "layers.1")
    seeds = {draws.fold(draws.fold(0, f"layers.{i}"), n) for i in range(200) for n in ("ffn", "mixer")}
    assert len(seeds) == 400
