"""What unequal widths cost: a bank of them against the bank of equal widths with as many hidden units in all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.plan import Plan
from ..core.rows import Rows
from ..experts.config import Gated
from ..ops.combine import gather_rows
from ..ops.rows import rows
from .machine import describe_machine
from .timing import interleave, ratio

__all__ = ["LIMIT", "SHAPES", "measure"]

LIMIT = 1.2  # times the equal bank's time
SHAPES = ((128, 8, 256, 4096), (256, 16, 256, 4096), (64, 16, 192, 2048))  # D, E, F, T


def measure(rounds: int = 25, seed: int = 0) -> dict[str, Any]:
    """Forward and backward of both banks on the same rows, top-2, in turns. Half the experts are F/2 wide, half 3F/2.

    Returns a JSON-able record: per shape, how many times the equal bank's time the unequal one takes.
    """
    found = []
    for D, E, F, T in SHAPES:
        widths = (F // 2,) * (E // 2) + (F + F // 2,) * (E - E // 2)
        generator = torch.Generator().manual_seed(seed)
        expert = torch.rand(T, E, generator=generator).topk(2, dim=1).indices
        index = rows(Plan(expert=expert, weight=torch.full((T, 2), 0.5), num_experts=E, complete=True))
        x = torch.randn(T, D, generator=generator)
        contenders: dict[str, Callable[[], None]] = {}
        for name, width in (("equal", F), ("unequal", widths)):
            bank = Gated(width=width).build(dim=D, num_experts=E)

            def run(bank: Any = bank, x: Tensor = x, index: Rows = index) -> None:
                leaf = x.detach().requires_grad_()
                y = bank(gather_rows(leaf, index), index)
                y.backward(torch.ones_like(y))
                bank.zero_grad(set_to_none=True)

            contenders[name] = run
        seconds = interleave(contenders, rounds, warmup=3)
        times = dataclasses.asdict(ratio(seconds, "equal", "unequal"))
        found.append({"dim": D, "experts": E, "width": F, "units": T, "times": times})
    return {
        "what": "time of a gated bank of unequal widths over that of the equal one, forward and backward, top-2",
        "machine": describe_machine(torch.device("cpu")),
        "seed": seed,
        "rounds": rounds,
        "limit": LIMIT,
        "shapes": found,
    }
