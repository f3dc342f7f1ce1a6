"""Record a decoder, read the file, and make the decoder route that way again."""

from __future__ import annotations

import pytest
import torch

from moestro.core.errors import UserError
from moestro.core.signals import Signals
from moestro.losses import RoutingEntropy, SwitchBalance, TokenInformation, ZLoss
from moestro.models.examples import examples
from moestro.nn.init import initialise
from moestro.trace import Recording
from moestro.trace.metrics import saturation
from moestro.trace.read import read
from moestro.trace.record import Recorder
from moestro.trace.replay import replay


def built(seed, config=None):
    base = config or examples()["mixed"]
    losses = (SwitchBalance(), RoutingEntropy(), TokenInformation(), ZLoss())
    model = base.replace(moe=base.moe.replace(losses=losses)).build()
    initialise(model, seed=seed, std=0.4)
    return model.eval()


def test_a_replayed_model_routes_as_recorded(tmp_path):
    tokens = torch.randint(37, (2, 12), generator=torch.Generator().manual_seed(0))
    first, other = built(0), built(1)
    want, _, trail = first(tokens)
    recorder = Recorder(Recording(weights="float32"))
    recorder.count(0, trail)
    recorder.sample(0, "valid", trail, {"token": tokens.reshape(-1)})
    recorder.write(tmp_path / "trace")
    trace = read(tmp_path / "trace")
    sample = trace.samples[0]
    assert [layer.path for layer in trace.layers] == [key.path for key in trail.plans()]
    assert trace.counts.entropy_units.tolist() == [[24, 24]]  # from the loss term: the layers keep no probabilities

    carry = replay(trace, sample, first)
    again, _, _ = first(tokens, carry=carry)
    assert torch.equal(again, want)

    own = other(tokens)[2]
    forced = other(tokens, carry=replay(trace, sample, other))[2]
    for key, plan in trail.plans().items():
        assert torch.equal(forced[key].plan.expert, plan.expert)
        assert not torch.equal(own[key].plan.expert, plan.expert)
        assert not torch.equal(forced[key].plan.weight, plan.weight)  # weights are the other model's own

    recorder.sample(1, "valid", own, {"token": tokens.reshape(-1)})
    both = recorder.trace()
    agree = saturation(both, *both.samples)
    assert all(0 < share < 1 for share in agree.values())
    with pytest.raises(UserError, match="'layers.1.ffn' has 4 experts, and the trace was recorded with 3"):
        replay(trace, sample, built(0, examples()["moe"]))


def test_losses_of_a_model_are_learned_from():
    model = built(0).train()
    tokens = torch.randint(37, (2, 12), generator=torch.Generator().manual_seed(0))
    _, _, trail = model(tokens, Signals(segment=torch.arange(24) // 12))
    names = {key.name for key in trail.terms()}
    assert names == {"load_balancing_loss", "routing_entropy", "token_information_loss", "z_loss"}
    trail.loss().backward()
    grads = [p.grad for n, p in model.named_parameters() if "router" in n]
    assert len(grads) == 2
    assert all(g.abs().max() > 0 for g in grads)
