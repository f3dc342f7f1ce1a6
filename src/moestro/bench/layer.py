"""Experts against experts: one layer, the same weights, the same choices, contenders in turns.

Every contender must first give the right output and, where gradients are timed, the right gradient of everything that
has one (x, combine weights, both matrices); one that does not is named and not timed. Routers are timed apart, and how
many of their choices differ from those of a float64 router is counted. A turn is as many calls as make some tens of
milliseconds; a contender that is so slow that all rounds would take too long sits out the last ones. Compilation
happens before, its time is in the record.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UserError
from . import layers, peers, routers
from .layers import Layer
from .machine import peak_of
from .problem import Answer, Inputs, Shape, Weights, distance, inputs, reference, weights
from .record import Regimes, begin, finish
from .timing import interleave

__all__ = ["SHAPE", "TOLERANCE", "Case", "cases", "measure"]

SHAPE = (512, 256, 32, 4)  # D, F, E, K
TOKENS = (1, 64, 256, 2048, 4096)
BIG = Shape(4096, 512, 256, 64, 8)
SKEWED = (256, 2048)  # tokens at which other routings than the balanced one are measured too
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}  # relative L2 to float64
TURN = 0.03  # seconds of a turn, at least
MOST_CALLS = 200
LONG = 0.2  # seconds of a call beside which asking the system for its memory costs nothing
FEW = 3  # rounds that even the slowest takes part in
TOKENS_THAT_ROTATE = 8  # where there is one token: a call after the other gets another one


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape, forward or forward and backward, under several routings; or the routers alone."""

    shape: Shape
    kind: str  # "forward", "forward + backward", "router"
    routings: tuple[str, ...] = ("balanced",)

    def regimes(self, dtype: torch.dtype) -> list[str]:
        """The name of the regime of each routing."""
        s = self.shape
        name = f"{self.kind}, T {s.tokens} D {s.dim} F {s.width} E {s.experts} K {s.top_k}"
        if dtype is not torch.float32:
            name += f" {str(dtype).removeprefix('torch.')}"
        return [name] if self.kind == "router" else [f"{name}, {routing}" for routing in self.routings]


def cases(
    shape: Sequence[int] = SHAPE, tokens: Sequence[int] = TOKENS, routings: Sequence[str] = ("balanced", "zipf", "idle")
) -> list[Case]:
    """What is measured: routers and forward passes up to 2048 tokens, forward and backward at all, and in the standard
    shape the big one. Several routings at numbers of tokens in SKEWED."""
    found: list[Case] = []
    D, F, E, K = shape
    few = [T for T in tokens if T <= 2048] or list(tokens)
    for T in few:
        found.append(Case(Shape(T, D, F, E, K), "router"))
    for kind, numbers in (("forward", few), ("forward + backward", tokens)):
        for T in numbers:
            found.append(Case(Shape(T, D, F, E, K), kind, tuple(routings if T in SKEWED else routings[:1])))
    if tuple(shape) == SHAPE and BIG.tokens in tokens:
        found.append(Case(BIG, "forward + backward", tuple(routings)))
    return found


def measure(
    wanted: Sequence[Case],
    *,
    rounds: int = 15,
    peers: bool = False,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    threads: int = 0,
    only: str = "",
    budget: float = 8.0,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure cases. Returns a JSON-able record, see `record`. peers: transformers' experts too. only: a part of the
    names of the regimes that are measured. budget: seconds that all rounds of one contender may take in a regime; it
    takes part in three at least."""
    if rounds < 1:
        raise UserError("bench layer: needs at least one round")
    if dtype not in TOLERANCE:
        raise UserError(f"bench layer: dtype {dtype}; known: {', '.join(str(d) for d in TOLERANCE)}")
    if threads:
        torch.set_num_threads(threads)
    place = torch.device(device)
    record = begin("time of one layer of experts", place, seed, rounds)
    say(record.get("warning", ""))
    record["budget_seconds"] = budget
    record["dtype"], record["tolerance"] = str(dtype).removeprefix("torch."), TOLERANCE[dtype]
    regimes: Regimes = {}
    for case in wanted:
        names = [name for name in case.regimes(dtype) if only in name]
        if names:
            regimes |= _Race(case, rounds, budget, peers, seed, place, dtype, say).run(names)
    if not regimes:
        raise UserError(f"bench layer: no regime has {only!r} in its name")
    return finish(record, "layer", regimes, place)


class _Race:
    """One case: contenders are built once and meet every routing."""

    def __init__(
        self,
        case: Case,
        rounds: int,
        budget: float,
        peers: bool,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        say: Callable[[str], None],
    ) -> None:
        self.case, self.rounds, self.peers, self.seed, self.say = case, rounds, peers, seed, say
        self.device, self.dtype, self.budget = device, dtype, budget
        self.backward = case.kind == "forward + backward"
        self.compiled: set[int] = set()

    def run(self, names: Sequence[str]) -> Regimes:
        if self.case.kind == "router":
            rows = routers.measure(self.case.shape, self.rounds, self.peers, self.seed, self.device, self.dtype)
            return {names[0]: self._regime(rows, "none")}
        shared = weights(self.case.shape, self.seed, self.device, self.dtype)
        makers = layers.makers(self.case.shape, shared, self.backward, self.peers)
        built: dict[str, Layer | str] = {}
        for name, make in makers.items():
            try:
                built[name] = make()
            except Exception as error:
                built[name] = peers.why(error)
        found: Regimes = {}
        for regime, kind in zip(self.case.regimes(self.dtype), self.case.routings):
            if regime in names:
                self.say(regime)
                found[regime] = self._regime(self._rows(built, shared, kind, regime), kind)
        del built, shared
        gc.collect()
        return found

    def _regime(self, rows: dict[str, Any], routing: str) -> dict[str, Any]:
        about = {"kind": self.case.kind, "routing": routing, **dataclasses.asdict(self.case.shape)}
        return about | {"ours": next(iter(rows)), "rows": rows}

    def _rows(self, built: dict[str, Layer | str], shared: Weights, kind: str, regime: str) -> dict[str, Any]:
        shape = self.case.shape
        number = TOKENS_THAT_ROTATE if shape.tokens == 1 else 1
        given = [inputs(shape, kind, self.seed + 1 + i, self.device, self.dtype) for i in range(number)]
        answers = [reference(g, shared, self.backward) for g in given]
        rows: dict[str, Any] = {}
        ready: dict[str, Callable[[], None]] = {}
        for name, layer in built.items():
            if isinstance(layer, str):
                rows[name] = {"absent": layer}
                continue
            if layer.bar and kind != self.case.routings[0] and name not in layers.EVERYWHERE:
                continue  # its time does not depend on the routing
            self.say(f"{regime}: checking {name}")
            try:
                rows[name] = self._check(layer, given, answers)
            except Exception as error:
                rows[name] = {"absent": peers.why(error)}
                continue
            if "refused" in rows[name]:
                continue
            ready[name] = self._call(layer, given)
        del answers
        self._time(rows, ready, built, number, regime)
        return rows

    def _check(self, layer: Layer, given: Sequence[Inputs], answers: Sequence[Answer]) -> dict[str, Any]:
        """The row of a layer before it is timed: errors, and how long the first call took."""
        row: dict[str, Any] = {"bar": True} if layer.bar else {"errors": {}}
        for g, answer in zip(given, answers):
            start = time.perf_counter()
            x, weight = (t.detach().requires_grad_(self.backward) for t in (g.x, g.weight))
            layer.clear()
            with torch.set_grad_enabled(self.backward):
                y = layer.run(x, g.expert, weight)
            if self.backward:
                y.backward(g.grad)
            self._wait()
            if layer.compiled and id(layer) not in self.compiled:
                self.compiled.add(id(layer))
                row["compile_seconds"] = time.perf_counter() - start
            if layer.bar:
                continue
            got: dict[str, Tensor | None] = {"y": y.detach()}
            if self.backward:
                got |= {"x": x.grad, "weight": weight.grad, **layer.grads()}
            for name, expected in {"y": answer.y, **answer.grads}.items():
                value = got.get(name)
                apart = math.inf if value is None else distance(value, expected)
                row["errors"][name] = max(apart, row["errors"].get(name, 0.0))
        layer.clear()
        if layer.bar:
            return row
        where = max(row["errors"], key=lambda name: row["errors"][name])
        worst = row["errors"][where]
        if worst > TOLERANCE[self.dtype]:
            of = "its output" if where == "y" else f"its gradient of {where}"
            row["errors"] = {name: e if math.isfinite(e) else None for name, e in row["errors"].items()}
            row["refused"] = f"{of} is {worst:.1e} away from float64"
        return row

    def _call(self, layer: Layer, given: Sequence[Inputs]) -> Callable[[], None]:
        """One call as it is timed. Gradients are cleared by it: a training step does that too."""
        turn = itertools.cycle(given)

        def forward() -> None:
            g = next(turn)
            with torch.no_grad():
                layer.run(g.x, g.expert, g.weight)

        def both() -> None:
            g = next(turn)
            layer.clear()
            x, weight = g.x.detach().requires_grad_(), g.weight.detach().requires_grad_()
            layer.run(x, g.expert, weight).backward(g.grad)

        return both if self.backward else forward

    def _time(
        self,
        rows: dict[str, Any],
        ready: dict[str, Callable[[], None]],
        built: dict[str, Layer | str],
        number: int,
        regime: str,
    ) -> None:
        gc.collect()
        alone: dict[str, float] = {}
        for name, call in ready.items():
            start = time.perf_counter()
            rows[name]["peak_bytes"] = peak_of(call, self.device)
            self._wait()
            alone[name] = time.perf_counter() - start
            if alone[name] < LONG:
                start = time.perf_counter()
                call()
                self._wait()
                alone[name] = time.perf_counter() - start
        if not alone:
            return
        turns: dict[str, Callable[[], None]] = {}
        for name, call in ready.items():
            calls = number * math.ceil(min(MOST_CALLS, max(1, TURN / alone[name])) / number)
            rows[name]["calls_per_turn"] = calls

            def turn(call: Callable[[], None] = call, calls: int = calls) -> None:
                for _ in range(calls):
                    call()
                self._wait()

            turns[name] = turn
        most = {
            name: min(self.rounds, max(FEW, int(self.budget / (t * rows[name]["calls_per_turn"]))))
            for name, t in alone.items()
        }
        say = self.say
        seconds = interleave(
            turns, self.rounds, most=most, each=lambda done, name: say(f"{regime}: {done} turns, {name}")
        )
        for name, values in seconds.items():
            rows[name]["seconds"] = [v / rows[name]["calls_per_turn"] for v in values]
            layer = built[name]
            if isinstance(layer, Layer):
                layer.clear()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
