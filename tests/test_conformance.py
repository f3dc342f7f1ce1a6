"""Every registered router, bank, exchange and loss passes the conformance suite because it is registered."""

from __future__ import annotations

import pytest

from moestro.routers.examples import examples as routers
from moestro.testing.routers import check_router


@pytest.mark.parametrize("name", routers())
def test_router(name):
    config = routers()[name]
    check_router(lambda: config.build(dim=16, num_experts=8), dim=16, num_experts=8)
