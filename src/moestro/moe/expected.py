"""How many experts a unit meets, for accounting."""

from __future__ import annotations

from typing import Any

__all__ = ["expected_k"]


def expected_k(router: Any) -> float:
    """Mean number of real experts per unit; what the router says, or all of them where it says nothing."""
    if hasattr(router, "expected_k"):
        return float(router.expected_k())
    E = float(router.num_experts)
    select = getattr(router, "select", None)
    k = getattr(select, "k", None)
    if not isinstance(k, int):
        return E
    ids = E + len(getattr(router, "virtual", ()))
    return min(E, k * E / ids)
