"""What the fast paths are meant to reach: ratios of times in one run of one benchmark, on one machine.

Loads no torch. `judged` compares a record with the goals that speak of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .timing import ratio

__all__ = ["GOALS", "METHOD", "PLAIN", "ROUTING", "Goal", "judged"]


@dataclasses.dataclass(frozen=True)
class Goal:
    """In `regime` of `benchmark`, `ours` against `peer`.

    at_least: times as fast as the peer. at_most: times the peer's time. One of them is given. ours: names in order of
    preference. regime: the beginning of a regime's name; routings follow it.
    """

    benchmark: str
    regime: str
    ours: str
    peer: str
    at_least: float | None = None
    at_most: float | None = None


METHOD, PLAIN = "method", "plain top-k"
ROUTING = (  # methods whose training steps are measured, by number of their brief
    "02 random experts, by batch",
    "02 random experts, by sentence",
    "02 two passes, per pass",
    "03 mix by similarity",
    "03 mix by attention",
    "13 random second choice, capacity",
    "21 top-p, entropy loss",
    "41 frozen router, experts on a schedule",
)

_GROUPED = "transformers grouped_mm"
_BIG = "forward + backward, T 4096 D 512 F 256 E 64 K 8"
_SMALL = "D 512 F 256 E 32 K 4"
_MODELS = {  # on a GPU
    "OLMoE": "D 2048 F 1024 E 64 K 8",
    "Qwen3-30B-A3B": "D 2048 F 768 E 128 K 8",
    "Mixtral": "D 4096 F 14336 E 8 K 2",
}
_CLASSES = ("Qwen3-MoE", "Mixtral", "GPT-OSS", "Nemotron-H", "Muse Spark")  # experts of transformers

GOALS: tuple[Goal, ...] = (
    Goal("layer", f"forward, T 64 {_SMALL}", "moestro", _GROUPED, at_least=2.5),
    Goal("layer", f"forward, T 256 {_SMALL}", "moestro", _GROUPED, at_least=1.3),
    Goal("layer", f"forward, T 2048 {_SMALL}", "moestro", _GROUPED, at_least=1.2),
    Goal("layer", f"forward + backward, T 64 {_SMALL}", "moestro", _GROUPED, at_least=1.6),
    Goal("layer", f"forward + backward, T 256 {_SMALL}", "moestro", _GROUPED, at_least=1.4),
    Goal("layer", f"forward + backward, T 2048 {_SMALL}", "moestro", _GROUPED, at_least=1.2),
    Goal("layer", f"forward + backward, T 1 {_SMALL}", "moestro, touched experts only", "loop, unbind", at_least=8.0),
    Goal("layer", _BIG, "moestro", "dense, width K*F", at_most=1.2),
    *(
        Goal("layer", f"{kind}, T 16384 {sizes} bfloat16", "moestro", peer, at_least=least)
        for sizes in _MODELS.values()
        for kind in ("forward", "forward + backward")
        for peer, least in (("dense products, width K*F", 0.75), (_GROUPED, 1.1))
    ),
    *(
        Goal("experts", f"{kind}, {name}, T {T} {_SMALL}", "moestro", _GROUPED, at_least=1.0)
        for name in _CLASSES
        for kind in ("forward", "forward + backward")
        for T in (1, 64, 2048)
    ),
    Goal("decode", f"cold decode, 8 layers, {_SMALL}", "moestro fp32", _GROUPED, at_least=4.0),
    Goal("decode", f"cold decode, 8 layers, {_SMALL}", "moestro fp32", "read once, fp32", at_most=1.35),
    Goal("decode", f"cold decode, 8 layers, {_SMALL}", "moestro int4", "read once, int4", at_most=3.5),
    Goal("decode", f"whole model, 8 layers, {_SMALL}", "moestro", _GROUPED, at_least=3.0),
    *(
        Goal("train", f"{preset}, step", "sparse", peer, at_least=least)
        for preset, least in (("stdlib", 1.15), ("bench", 1.4))
        for peer in ("transformers model", "grouped_mm")
    ),
    Goal("train", "bench, experts", "sparse", "grouped_mm", at_least=1.4),
    *(Goal("routing", method, METHOD, PLAIN, at_most=1.3) for method in ROUTING),
)


def judged(
    benchmark: str, seconds: Mapping[str, Mapping[str, Sequence[float]]], goals: Sequence[Goal] = GOALS
) -> list[dict[str, Any]]:
    """One entry per goal and regime it speaks of, where both take part.

    seconds: regime -> contender -> seconds per round, none where it was not timed. "measured" is the median over rounds
    of the ratio that the goal is stated in, "low" and "high" its quartiles, "fastest" that of the fastest rounds.
    """
    found = []
    for goal in goals:
        for regime, times in seconds.items():
            if goal.benchmark != benchmark or not _speaks(goal, regime):
                continue
            if goal.ours not in times or goal.peer not in times:
                continue
            entry = dataclasses.asdict(goal) | {"regime": regime}
            if not times[goal.ours] or not times[goal.peer]:
                missing = goal.peer if times[goal.ours] else goal.ours
                found.append(entry | {"measured": None, "holds": None, "why": f"{missing} was not timed"})
                continue
            pair = (goal.ours, goal.peer) if goal.at_least is not None else (goal.peer, goal.ours)
            r = ratio(times, *pair)
            fastest = min(times[pair[1]]) / min(times[pair[0]])
            found.append(
                entry
                | {"measured": r.median, "low": r.low, "high": r.high, "fastest": fastest}
                | {"holds": _holds(goal)(r.median)}
            )
    return found


def _speaks(goal: Goal, regime: str) -> bool:
    return regime == goal.regime or regime.startswith(goal.regime + ", ")


def _holds(goal: Goal) -> Callable[[float], bool]:
    if goal.at_least is not None:
        least = goal.at_least
        return lambda measured: measured >= least
    most = goal.at_most or 0.0
    return lambda measured: measured <= most
