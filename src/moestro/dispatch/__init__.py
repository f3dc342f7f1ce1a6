"""Exchanges: they have the call of a bank, carry rows to it and back, and nest by wrapping. Configs load no torch."""

from .config import Capacity, Exchange, Local, examples

__all__ = ["Capacity", "Exchange", "Local", "examples"]
