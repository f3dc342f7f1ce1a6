"""`--set PATH=VALUE`."""

from __future__ import annotations

import pytest

from moestro.cli.override import override
from moestro.core.config import Config, config
from moestro.core.errors import UserError
from moestro.losses.config import Loss, SwitchBalance
from moestro.moe.config import MoELayer
from moestro.routers.config import Router, TopK


@config
class Outer(Config):
    layer: MoELayer = MoELayer()
    """A layer."""
    sizes: tuple[int, ...] = (1, 2)
    """Numbers."""
    name: str = "a"
    """A text."""
    other: SwitchBalance | None = None
    """A part that may be absent."""


@pytest.mark.parametrize(
    ("setting", "read", "value"),
    [
        ("layer.num_experts=16", lambda c: c.layer.num_experts, 16),
        ("layer.num-experts=16", lambda c: c.layer.num_experts, 16),
        ("name=b", lambda c: c.name, "b"),
        ('name="7"', lambda c: c.name, "7"),
        ("sizes=[3, 4, 5]", lambda c: c.sizes, (3, 4, 5)),
        ("sizes.1=9", lambda c: c.sizes, (1, 9)),
        ('layer.router={"activation": "sigmoid"}', lambda c: c.layer.router, Router(activation="sigmoid")),
        ("layer.router.select=routers.TopK", lambda c: c.layer.router.select, TopK()),
        (
            'layer.router.select={"type": "routers.TopK", "k": 3}',
            lambda c: c.layer.router,
            Router(select=TopK(k=3)),
        ),
        ("layer.losses.0.coefficient=0.5", lambda c: c.layer.losses, (SwitchBalance(coefficient=0.5),)),
        ("layer.losses=[]", lambda c: c.layer.losses, ()),
        (
            'layer.losses=["losses.Loss", {"type": "losses.SwitchBalance", "coefficient": 1}]',
            lambda c: c.layer.losses,
            (Loss(), SwitchBalance(coefficient=1.0)),
        ),
        ("other=losses.SwitchBalance", lambda c: c.other, SwitchBalance()),
    ],
)
def test_settings(setting, read, value) -> None:
    assert read(override(Outer(), [setting])) == value


def test_settings_apply_in_order_and_change_nothing_else() -> None:
    made = override(Outer(), ["other=losses.SwitchBalance", "other.coefficient=2", "layer.router.select.k=3"])
    assert made == Outer(other=SwitchBalance(coefficient=2.0), layer=MoELayer(router=Router(select=TopK(k=3))))


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("layer", "write it as PATH=VALUE"),
        ("=3", "write it as PATH=VALUE"),
        ("layer.num_expert=3", "did you mean 'num_experts'"),
        ("layer.router.select=routers.TopKK", "unknown config type 'routers.TopKK'"),
        ("layer.router.select=losses.SwitchBalance", "no Select"),
        ("layer.num_experts=many", "expected int"),
        ('layer.router={"activation"', "no valid JSON"),
        ("layer.losses.3.coefficient=1", "no place in a list of 1"),
        ("name.x=1", "nothing called 'x'"),
    ],
)
def test_bad_settings(setting, says) -> None:
    with pytest.raises(UserError, match=says):
        override(Outer(), [setting])
