"""The knob `experts`: all of them averaged, or one everywhere, whatever the router (brief 02, inference)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe.layer_cases import D, E, T, build, tokens
from moestro.core.errors import UserError
from moestro.core.signals import Signals
from moestro.core.trail import Key
from moestro.experts import MLP, Gated
from moestro.models import encoder_decoders
from moestro.routers import examples
from moestro.serve.translate import beam_search, translate
from moestro.testing.attend import causal_map
from moestro.testing.compare import assert_close

N = torch.arange(T)
GIVEN: dict[str, Any] = {"segment": N // 6, "position": N % 6, "label": N % E, "task": N % E, "unit_id": N}


def one(layer: Any, x: Tensor, e: int) -> Tensor:
    """f_e(x) from the parameters, in float64."""
    p = {name: t[e].double() for name, t in layer.experts.named_parameters()}
    x = x.reshape(-1, D).double()
    if "gate_up" in p:
        gate, up = (x @ p["gate_up"].T).chunk(2, -1)
        return torch.nn.functional.silu(gate) * up @ p["down"].T
    return torch.relu(x @ p["up"].T + p["up_bias"]) @ p["down"].T + p["down_bias"]


@pytest.mark.parametrize("name", examples())
@torch.no_grad()
def test_every_router_obeys(name: str) -> None:
    """Ensemble of brief 02: y = mean over e of f_e(x); and expert_num = e: y = f_e(x), with weight 1."""
    layer = build(router=examples()[name], experts=Gated(width=10), losses=()).eval()
    x = tokens()
    given: dict[str, Any] = {**GIVEN, "attend": causal_map(GIVEN["segment"], None)}
    every = torch.stack([one(layer, x, e) for e in range(E)])
    for wanted, want in (("all", every.mean(0)), (0, every[0]), (E - 1, every[E - 1])):
        y, _, trail = layer(x, Signals(**given, knobs={"experts": wanted}))
        assert_close(f"{name}, {wanted}", y.reshape(T, D), want, 1e-5)
        trail[Key("", 0)].plan.check()
        assert int(trail[Key("", 0)].load.sum()) == T * (E if wanted == "all" else 1)


@torch.no_grad()
def test_padding_and_biases() -> None:
    layer = build(experts=MLP(width=10, activation="relu", bias=True)).eval()
    valid = N % 6 < 4
    for wanted, want in (("all", sum(one(layer, tokens(), e) for e in range(E)) / E), (2, one(layer, tokens(), 2))):  # type: ignore[operator]
        y, _, trail = layer(tokens(), Signals(valid=valid, knobs={"experts": wanted}))
        assert_close(str(wanted), y.reshape(T, D), torch.where(valid[:, None], want, 0), 1e-5)
        trail[Key("", 0)].plan.check()


def test_one_expert_forced_in_training_gets_the_gradient() -> None:
    """`expert_num` of brief 02's train_step."""
    layer = build(losses=())
    layer(tokens(), Signals(knobs={"experts": 3}))[0].sum().backward()
    got = layer.experts.down.grad
    assert {e for e in range(E) if bool(got[e].any())} == {3}


@pytest.mark.parametrize("wanted", [E, -1, "some", 1.0, True])
def test_experts_that_do_not_exist(wanted: Any) -> None:
    with pytest.raises(UserError, match=r"the knob experts is .* here 0 to 7"):
        build()(tokens(), Signals(knobs={"experts": wanted}))


@torch.no_grad()
def test_models_and_translations_obey() -> None:
    model: Any = encoder_decoders()["post_norm"].build().eval()
    _, _, trail = model(torch.ones(2, 5).long(), torch.ones(2, 4).long(), Signals(knobs={"experts": 1}))
    assert len(trail) == 2
    for record in trail.values():
        assert set(record.plan.expert.flatten().tolist()) == {1}
    sources = [[3, 4, 5], [6, 7, 8, 9]]
    for knobs in ({"experts": "all"}, {"experts": 0}):
        signals = Signals(knobs=knobs)
        made = translate(model, sources, 4, knobs=knobs)
        for source, row, beams in zip(sources, made, beam_search(model, sources, 4, beams=1, knobs=knobs)):
            written = [model.config.start]
            for _ in range(4):
                written.append(int(model(torch.tensor([source]), torch.tensor([written]), signals)[0][0, -1].argmax()))
            assert row.tokens.tolist() == written[1:] == beams[0].tokens.tolist()  # type: ignore[union-attr, index]
