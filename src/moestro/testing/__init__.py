"""The public conformance suite: checks that any router, bank, exchange, loss or model must pass, ours or yours.

Each check raises AssertionError with the name of what failed. They import nothing of pytest, so they run anywhere:

    from moestro.testing.routers import check_router
    check_router(lambda: MyRouter(dim=16, num_experts=8), dim=16, num_experts=8)
"""
