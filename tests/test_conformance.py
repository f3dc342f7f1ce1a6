"""Every registered router, bank, exchange and loss passes the conformance suite because it is registered."""

from __future__ import annotations

import pytest

from moestro.core.errors import UserError
from moestro.experts.config import Gated
from moestro.models.examples import examples as models
from moestro.moe.config import MoELayer
from moestro.routers.config import All, ExpertChoiceSelect
from moestro.routers.examples import examples as routers
from moestro.testing.models import check_model
from moestro.testing.routers import check_router

DEFAULT = MoELayer().losses


@pytest.mark.parametrize("name", routers())
def test_router(name):
    config = routers()[name]
    check_router(lambda: config.build(dim=16, num_experts=8), dim=16, num_experts=8)


@pytest.mark.parametrize("name", models())
def test_model(name):
    check_model(models()[name])


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
