"""Knobs on a trained model: whether its routers read them, and evaluation over several values (self-slimming)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..core.config import Config
from ..core.errors import UserError
from ..routers.config import Limit, Mix, Router, Select
from ..routers.router import StepRouter
from ..tasks.batches import Feed
from .config import TrainRun
from .evaluate import Evaluation, evaluate
from .knobs import Knob
from .load import Loaded
from .ranks import Ranks

__all__ = ["check_knobs", "evaluate_over", "validate_over"]

# knob -> base of the configs whose parts read it, and the fields that it stands in for
_READERS: dict[str, tuple[type[Config], tuple[str, ...]]] = {
    "top_k": (Select, ("k",)),
    "top_p": (Select, ("p",)),
    "capacity_factor": (Config, ("capacity_factor", "factor", "size")),
    "temperature": (Router, ("temperature",)),
    "mix_tau": (Mix, ("tau",)),
}


def check_knobs(knobs: Sequence[Knob], model: nn.Module, steps: int) -> None:
    """Raise `UserError` for a knob that no router of the model reads, and for more experts than one has."""
    routers = {path: m for path, m in model.named_modules() if isinstance(m, StepRouter)}
    for knob in knobs:
        values = [knob.value(t, steps) for t in range(steps + 1)]
        check_values(knob.name, values, routers)


def check_values(name: str, values: Sequence[float], routers: dict[str, StepRouter]) -> None:
    """The same for values of one knob. routers: path -> router."""
    readers = {path: router for path, router in routers.items() if _reads(router.config, name)}
    if not readers:
        known = [n for n in _READERS if any(_reads(r.config, n) for r in routers.values())]
        raise UserError(f"no router of this model reads the knob {name}; they read {', '.join(known) or 'none'}")
    for path, router in readers.items():
        ids = router.subset.num_local + len(router.virtual)
        if name == "top_k" and not 1 <= min(values) <= max(values) <= ids:
            raise UserError(
                f"the knob top_k goes from {min(values)} to {max(values)}, but {path} can choose 1 to {ids} experts"
            )


def evaluate_over(
    model: nn.Module,
    objective: Any,
    batches: Feed,
    config: TrainRun,
    values: Sequence[float],
    name: str = "top_k",
    ranks: Ranks | None = None,
    watch: Callable[[int, int], None] | None = None,
) -> dict[float, Evaluation]:
    """Evaluate a model with each value of one knob on the same windows: value -> what was found.

    Nothing of the model changes; its configured values hold again afterwards. watch: as in `evaluate`, per value.
    """
    check_values(name, values, {path: m for path, m in model.named_modules() if isinstance(m, StepRouter)})
    ranks = Ranks(device=str(next(model.parameters()).device)) if ranks is None else ranks
    at = {value: {name: value} for value in values}
    return {v: evaluate(model, objective, batches, config, ranks, watch=watch, knobs=at[v]) for v in values}


def validate_over(
    loaded: Loaded,
    batches: Feed,
    values: Sequence[float],
    name: str = "top_k",
    watch: Callable[[int, int], None] | None = None,
) -> dict[float, float]:
    """Bits per byte of a run's model on its validation windows with each value of one knob (see `held_out`); of
    examples, nats per target."""
    config = loaded.config
    found = evaluate_over(loaded.model, config.objective.build(), batches, config, values, name, watch=watch)
    return {value: one.score for value, one in found.items()}


def _reads(config: Any, name: str) -> bool:
    """Whether a router's config, or a part of it, has a field that the knob stands in for."""
    base, fields = _READERS[name]
    if not isinstance(config, Config):
        return False
    nested = [getattr(config, f.name) for f in dataclasses.fields(config)]  # type: ignore[arg-type]
    own = isinstance(config, base) and (base is not Config or isinstance(config, Select | Limit))
    return (own and any(hasattr(config, f) for f in fields)) or any(_reads(part, name) for part in nested)
