"""What a training step holds, measured: by hand on small graphs, and against what configs count."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moestro.core.memory import saved
from moestro.experts import Gated
from moestro.models import examples
from moestro.models.growth import step_cost, still
from moestro.moe import MoELayer
from moestro.nn import IdCode
from moestro.optim.config import Muon
from moestro.train.memory import step_memory

TEXT = torch.randint(0, 37, (4, 16), generator=torch.Generator().manual_seed(3))
DEEP = examples()["dense"].replace(embedding=IdCode(bits=8), num_layers=4)


def nats(model) -> torch.Tensor:
    return model.loss(TEXT[:, :-1], TEXT[:, 1:])[0]


def test_saved_bytes_by_hand():
    """A linear map keeps its input for the weight's gradient, and its weight, which is no activation; one storage
    counts once; what no gradient passes keeps nothing."""
    layer, x = nn.Linear(4, 5, bias=False), torch.randn(3, 4)
    with saved(layer) as found:
        layer(x)
    assert found.bytes == 3 * 4 * 4
    layer.weight.requires_grad_(False)
    with saved(layer) as found:
        layer(x)
    assert found.bytes == 0
    y = torch.randn(3, 4, requires_grad=True)
    with saved(layer) as found:
        z = y * y  # y twice
        z.view(4, 3).sin()  # z in another shape
    assert found.bytes == 2 * 3 * 4 * 4


def test_a_step_holds_what_is_counted():
    model = DEEP.build()
    kept = {n: t.clone() for n, t in model.state_dict().items()}
    everything = step_memory(model, nats)
    whole, tensors = step_cost(model), sum(1 for _ in model.parameters())
    assert everything.trained == whole.trained == sum(p.numel() for p in model.parameters())
    assert everything.gradients == whole.gradient_bytes
    assert everything.optimizer == whole.optimizer_bytes + 4 * tensors  # the number of steps, of each
    assert everything.model == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert all(torch.equal(t, kept[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_frozen_blocks_below_keep_nothing():
    """Brief 45, B: of four equal blocks, two frozen below: what those keep goes, no more."""
    model = DEEP.build()
    everything = step_memory(model, nats)
    still(model, [":2"])
    half = step_memory(model, nats)
    assert (half.gradients, half.trained) == (step_cost(model).gradient_bytes, step_cost(model).trained)
    still(model, ["2"])
    last = step_memory(model, nats)
    each = half.activations - last.activations
    assert each > 0
    assert everything.activations == pytest.approx(half.activations + 2 * each, rel=0.02)
    hidden = model.run(model.embed(TEXT), stop=3)[0]
    assert not hidden.requires_grad


def test_another_optimiser_and_routed_layers():
    """Muon keeps one moment for matrices: less than AdamW."""
    config = examples()["moe"].replace(moe=MoELayer(num_experts=4, experts=Gated(width=8)))
    model = config.build()
    adam, muon = step_memory(model, nats), step_memory(model, nats, Muon())
    assert adam.gradients == muon.gradients
    assert muon.optimizer < 0.8 * adam.optimizer
