"""Saving, loading and casting the state of routers."""

import pytest
import torch

from routers.router_cases import DIM, EXAMPLES, E, build, same_decision, signals, units

every = pytest.mark.parametrize("name", EXAMPLES)


@every
@pytest.mark.parametrize("assign", [False, True])
def test_state_round_trip(name: str, assign: bool) -> None:
    router = build(name)
    router.step(torch.arange(E))
    state = {n: t.clone() for n, t in router.state_dict().items()}
    with torch.device("meta"):
        empty = EXAMPLES[name].build(dim=DIM, num_experts=E)
    fresh = empty.to_empty(device="cpu") if not assign else empty
    fresh.load_state_dict(state, assign=assign)
    a, b = router(units(20), signals(20))[0], fresh(units(20), signals(20))[0]
    assert same_decision(a, b)
    assert torch.equal(a.weight, b.weight)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to", "empty"])
def test_the_bias_stays_in_single_precision(cast: str) -> None:
    router = build("loss-free-groups")
    router.step(torch.arange(E))
    before = router.select.bias.clone()
    if cast == "empty":
        with torch.device("meta"):
            moved = EXAMPLES["loss-free-groups"].build(dim=DIM, num_experts=E).to(torch.bfloat16)
        assert moved.select.bias.dtype == torch.float32
        moved.to_empty(device="cpu").load_state_dict({n: t.bfloat16() for n, t in router.state_dict().items()})
        assert moved.select.bias.dtype == torch.float32
        return
    router = router.to(torch.bfloat16) if cast == "to" else getattr(router, cast)()
    assert router.score.weight.dtype != torch.float32
    assert router.select.bias.dtype == torch.float32
    assert torch.equal(router.select.bias, before)
    assert dict(router.named_buffers())["select.bias"] is router.select.bias
    router.step(torch.arange(E))
    assert torch.equal(router.select.bias, 2 * before)
    low = {n: t.bfloat16() for n, t in router.state_dict().items()}
    router.load_state_dict(low, assign=True)
    assert router.select.bias.dtype == torch.float32
