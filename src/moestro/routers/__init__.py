"""Routers: who goes where. Five replaceable steps and the composite that runs them; configs here, torch-free."""

from __future__ import annotations

from .config import AnyRouter, Limit, Linear, Mix, Renormalised, Router, Score, Select, TopK, Weigh

__all__ = ["AnyRouter", "Limit", "Linear", "Mix", "Renormalised", "Router", "Score", "Select", "TopK", "Weigh"]
