"""Timing several contenders fairly: in turn, in one process, in a new order every round, compared round by round."""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

__all__ = ["Spread", "interleave", "ratio", "spread"]


@dataclasses.dataclass(frozen=True)
class Spread:
    """A median with the quartiles and extremes around it."""

    median: float
    low: float
    high: float
    least: float
    most: float

    def scaled(self, factor: float) -> Spread:
        return Spread(*(factor * v for v in dataclasses.astuple(self)))


def interleave(
    contenders: Mapping[str, Callable[[], None]],
    rounds: int,
    *,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    each: Callable[[int, str], None] = lambda done, name: None,
    most: Mapping[str, int] | None = None,
) -> dict[str, list[float]]:
    """Seconds per call, name -> one figure per round.

    A slow minute of the machine meets every contender: each round runs all of them once. The order is drawn anew for
    every round (the same orders in every run): what one leaves behind in caches and free memory is not always met by
    the same next one. `each(calls done, name)` is called after every call, for progress. most: name -> the rounds
    after which a contender (a slow one) sits out.
    """
    names = list(contenders)
    limits = dict.fromkeys(names, rounds) | dict(most or {})
    seconds: dict[str, list[float]] = {name: [] for name in names}
    draw, done = random.Random(0), 0
    for turn in range(warmup + rounds):
        for name in draw.sample(names, len(names)):
            if turn - warmup >= limits[name]:
                continue
            start = clock()
            contenders[name]()
            took = clock() - start
            if turn >= warmup:
                seconds[name].append(took)
            done += 1
            each(done, name)
    return seconds


def spread(values: list[float]) -> Spread:
    """Median, quartiles and extremes of at least one value."""
    ordered = sorted(values)
    if len(ordered) < 2:
        return Spread(*(ordered * 5))
    low, _, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return Spread(statistics.median(ordered), low, high, ordered[0], ordered[-1])


def ratio(seconds: Mapping[str, Sequence[float]], name: str, to: str) -> Spread:
    """Speed of `name` relative to that of `to` (above 1 = faster), computed in each round that both ran, then
    summarised."""
    return spread([theirs / ours for ours, theirs in zip(seconds[name], seconds[to])])
