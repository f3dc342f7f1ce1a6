"""Configs of exchanges: how rows are carried to experts and back. Built with the bank (or exchange) that they wrap."""

from __future__ import annotations

from typing import ClassVar

from ..core.config import Config, config


@config
class Exchange(Config):
    """Base of exchanges: `build(inner)` wraps a bank or another exchange."""


@config
class Local(Exchange):
    """Rows stay where they are; nothing is dropped."""

    builds: ClassVar[str] = "moestro.dispatch.local:LocalExchange"


@config
class Capacity(Exchange):
    """Every expert receives a table of the same fixed size, padded with zeros: static shapes. Needs a capacity."""

    builds: ClassVar[str] = "moestro.dispatch.capacity:CapacityExchange"
    inner: Exchange = Local()
    """The exchange that carries the padded tables."""


def examples() -> dict[str, Exchange]:
    """Tiny members of every kind of exchange; tests are generated from them."""
    return {"local": Local(), "capacity": Capacity(), "capacity_twice": Capacity(inner=Capacity())}
