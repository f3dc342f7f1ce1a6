"""How many experts a unit meets, for accounting."""

from __future__ import annotations

from typing import Any

__all__ = ["expected_k"]


def expected_k(router: Any) -> float:
    """Mean number of real experts per unit; what the router says, or all of them where it says nothing.

    Of a router of steps it is the most that its select step gives a unit (expert choice: the mean; top-p: what its
    config expects), less the share of virtual ids, as if all ids were equally likely.
    """
    if hasattr(router, "expected_k"):
        return float(router.expected_k())
    E = float(router.num_experts)
    select = getattr(router, "select", None)
    said = getattr(select, "expected", None)
    k = getattr(select, "top_k", None) if said is None else said
    if k is None:
        return E
    subset = getattr(router, "subset", None)
    local = float(getattr(subset, "num_local", E))
    return min(local, float(k) * local / (local + len(getattr(router, "virtual", ()))))
