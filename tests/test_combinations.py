"""Every registered router with every registered bank through every registered exchange: oracle, gradients, training."""

from __future__ import annotations

import pytest

from moestro.core.config import Config
from moestro.core.errors import UserError
from moestro.dispatch.config import examples as exchanges
from moestro.experts.config import Gated, Modules
from moestro.experts.config import examples as banks
from moestro.losses.config import Loss, SwitchBalance
from moestro.moe.config import MoELayer
from moestro.routers.config import All, ExpertChoiceSelect, Router
from moestro.routers.examples import examples as routers
from moestro.testing.layers import check_layer


def for_eight(bank: Config) -> Config:
    """The example banks of unequal experts describe four: the same ones twice."""
    if isinstance(bank, Gated) and isinstance(bank.width, tuple):
        return bank.replace(width=bank.width * 2)
    if isinstance(bank, Modules) and len(bank.experts) > 1:
        return bank.replace(experts=bank.experts * 2)
    return bank


def has_capacity(router: Router) -> bool:
    return router.limit is not None or isinstance(router.select, ExpertChoiceSelect | All)


def losses_for(router: Router) -> tuple[Loss, ...]:
    """A balance loss wherever balance can be lost and scores are a distribution."""
    equal = isinstance(router.select, ExpertChoiceSelect | All)
    return () if equal or router.activation == "identity" else (SwitchBalance(),)


@pytest.mark.parametrize("bank", banks())
@pytest.mark.parametrize("router", routers())
def test_combination(router: str, bank: str) -> None:
    for exchange in exchanges().values():
        config = MoELayer(
            num_experts=8,
            router=routers()[router],
            experts=for_eight(banks()[bank]),
            exchange=exchange,
            losses=losses_for(routers()[router]),
        )
        if exchange == exchanges()["local"] or has_capacity(routers()[router]):
            check_layer(config)
        else:
            with pytest.raises(UserError, match="the capacity exchange needs a plan with a capacity"):
                check_layer(config)
