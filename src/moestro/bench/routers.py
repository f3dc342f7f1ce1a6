"""Routers by themselves: time, and how many choices differ from those of a float64 router."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.carry import Carry
from ..core.signals import Signals
from ..routers.config import Router, TopK
from .peers import transformers_modules, why
from .problem import Shape, distance
from .timing import interleave

__all__ = ["measure"]

Route = Callable[[Tensor], tuple[Tensor, Tensor]]  # x [T, D] -> expert [T, K], weight [T, K]

TURN, MOST_CALLS = 0.02, 200


def measure(
    shape: Shape, rounds: int, peers: bool, seed: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Rows as those of layers: softmax over all experts, the top K, renormalised; the same matrix [E, D] for all.

    errors: "differing" counts choices that a float64 router does not make; "weights" is the relative L2 distance of
    the tables [T, E] of combine weights.
    """
    generator = torch.Generator().manual_seed(seed)
    matrix = (torch.randn(shape.experts, shape.dim, generator=generator) / math.sqrt(shape.dim)).to(device, dtype)
    x = torch.randn(shape.tokens, shape.dim, generator=generator).to(device, dtype)
    K = shape.top_k
    expected = _plain(matrix.double(), K)(x.double())
    makers: dict[str, Callable[[], Route]] = {
        "moestro router": lambda: _ours(matrix, K),
        "plain router": lambda: _plain(matrix, K),
    }
    if peers:
        makers["transformers router"] = lambda: _transformers(matrix, K)
    rows: dict[str, Any] = {}
    turns: dict[str, Callable[[], None]] = {}
    for name, make in makers.items():
        try:
            route = make()
            found = _table(shape, *route(x))
        except Exception as error:
            rows[name] = {"absent": why(error)}
            continue
        differing = int(((found != 0) & (_table(shape, *expected) == 0)).sum())
        start = time.perf_counter()
        route(x)
        calls = max(1, min(MOST_CALLS, int(TURN / (time.perf_counter() - start))))
        rows[name] = {
            "errors": {"differing": differing, "weights": distance(found, _table(shape, *expected))},
            "calls_per_turn": calls,
        }
        turns[name] = lambda route=route, calls=calls: _turn(route, x, calls)
    for name, values in interleave(turns, rounds).items():
        rows[name]["seconds"] = [v / rows[name]["calls_per_turn"] for v in values]
    return rows


def _turn(route: Route, x: Tensor, calls: int) -> None:
    for _ in range(calls):
        route(x)
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)


def _table(shape: Shape, expert: Tensor, weight: Tensor) -> Tensor:
    table = torch.zeros(shape.tokens, shape.experts, dtype=torch.float64, device=expert.device)
    return table.scatter_(1, expert, weight.double())


def _plain(matrix: Tensor, top_k: int) -> Route:
    def route(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            kept = (x @ matrix.t()).softmax(-1).topk(top_k, dim=-1)
            return kept.indices, kept.values / kept.values.sum(-1, keepdim=True)

    return route


def _ours(matrix: Tensor, top_k: int) -> Route:
    E, D = matrix.shape
    router: Any = Router(select=TopK(k=top_k)).build(dim=D, num_experts=E).to(matrix.device).eval()
    with torch.no_grad():
        router.score.weight.copy_(matrix)
    signals, carry = Signals(), Carry()

    def route(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            plan, _ = router(x, signals, carry)
        return plan.expert, plan.weight

    return route


def _transformers(matrix: Tensor, top_k: int) -> Route:
    config, modeling = transformers_modules()
    E, D = matrix.shape
    router = modeling.Qwen3MoeTopKRouter(
        config.Qwen3MoeConfig(num_experts=E, hidden_size=D, num_experts_per_tok=top_k, norm_topk_prob=True)
    ).to(matrix.device, matrix.dtype)
    with torch.no_grad():
        router.weight.copy_(matrix)

    def route(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            _, weight, expert = router(x)
        return expert, weight

    return route
