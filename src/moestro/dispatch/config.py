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
