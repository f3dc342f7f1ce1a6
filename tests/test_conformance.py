"""Registered losses and models, with every router, pass the conformance suite because they are registered.

Routers, banks and exchanges by themselves: see their folders.
"""

from __future__ import annotations

import pytest
import torch

from moestro.core.errors import UserError
from moestro.experts.config import Gated
from moestro.losses import examples as losses
from moestro.models.examples import encoder_decoders, encoders, with_heads
from moestro.models.examples import examples as models
from moestro.moe.config import MoELayer
from moestro.routers.config import All, ExpertChoiceSelect
from moestro.routers.examples import examples as routers
from moestro.testing.headed import check_headed
from moestro.testing.losses import check_loss
from moestro.testing.models import check_model

DEFAULT = MoELayer().losses


@pytest.mark.parametrize("name", losses())
def test_loss(name):
    loss = losses()[name].build()
    given = {"segment": torch.arange(24) // 6, "task": torch.arange(24) % 2}
    check_loss(loss, {n: t for n, t in given.items() if n in loss.needs})


@pytest.mark.parametrize("name", models())
def test_model(name):
    check_model(models()[name])


@pytest.mark.parametrize("name", encoders())
def test_encoder(name):
    check_model(encoders()[name])


@pytest.mark.parametrize("name", encoder_decoders())
def test_encoder_decoder(name):
    check_model(encoder_decoders()[name])


@pytest.mark.parametrize("name", with_heads())
def test_headed(name):
    check_headed(with_heads()[name])


@pytest.mark.parametrize("name", routers())
def test_router_in_a_decoder(name):
    """What a decoder promises holds whichever router sits in it; one that is not causal is refused unless allowed."""
    router = routers()[name]
    losses = () if isinstance(router.select, ExpertChoiceSelect | All) or router.activation == "identity" else DEFAULT
    moe = MoELayer(num_experts=8, router=router, experts=Gated(width=8), losses=losses)
    causal = router.build(dim=16, num_experts=8).causal
    config = models()["moe"].replace(moe=moe, allow_noncausal=not causal)
    check_model(config, causal=causal)
    if not causal:
        with pytest.raises(UserError, match="is not causal"):
            config.replace(allow_noncausal=False).build()


@pytest.mark.parametrize("name", routers())
def test_router_in_an_encoder_decoder(name):
    """On both sides; the encoder takes any router."""
    router = routers()[name]
    losses = () if isinstance(router.select, ExpertChoiceSelect | All) or router.activation == "identity" else DEFAULT
    moe = MoELayer(num_experts=8, router=router, experts=Gated(width=8), losses=losses)
    causal = router.build(dim=16, num_experts=8).causal
    pair = encoder_decoders()["rotary"]
    encoder, decoder = (side.replace(moe=moe, num_layers=1) for side in (pair.encoder, pair.decoder))
    config = pair.replace(encoder=encoder, decoder=decoder.replace(allow_noncausal=not causal))
    check_model(config, causal=causal, steps=10)
