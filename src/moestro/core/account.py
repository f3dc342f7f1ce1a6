"""Counting parameters, active parameters and FLOPs from the module tree.

A module whose cost is not the sum of its children's plus its own matrices says so: `cost(seq_len) -> Cost` replaces the
whole count (banks of experts, of which a unit meets some), `extra_flops(seq_len)` adds forward FLOPs per token
(attention scores, matrices that are no `nn.Linear`, tied heads), `extra_backward_flops(seq_len)` adds what its backward
pass costs beyond two forward passes (attention kernels compute the scores again).

FLOPs are those of matrix products, two per multiply-add, per token; element-wise work is not counted, attention is
counted over all pairs, recomputation under checkpointing is not counted. This is what torch's FlopCounterMode counts.
Parameters that are shared (tied embeddings) count once; all embeddings count as active, as in published figures.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

__all__ = ["Cost", "CostLine", "breakdown", "cost"]


class Cost(NamedTuple):
    """params: all parameters. active: those that one token meets. flops: forward matrix FLOPs per token.
    backward_extra: backward FLOPs per token beyond twice the forward ones.
    """

    params: int
    active: int
    flops: int
    backward_extra: int = 0

    @property
    def train_flops(self) -> int:
        """Matrix FLOPs per token of a forward and a backward pass."""
        return 3 * self.flops + self.backward_extra

    def __add__(self, other: Cost) -> Cost:  # type: ignore[override]
        return Cost(*(a + b for a, b in zip(self, other)))


class CostLine(NamedTuple):
    """One row of a layer-by-layer table. bytes: storage of the parameters in their own dtype."""

    path: str
    kind: str
    cost: Cost
    bytes: int


def cost(module: nn.Module, seq_len: int = 1) -> Cost:
    """The cost of a module at sequences of `seq_len` tokens. Parameters shared inside it are counted once."""
    return _cost(module, seq_len, set())


def own_cost(module: nn.Module, seen: set[int]) -> Cost:
    """The module's direct parameters: all active; matrices of linear layers cost 2 FLOPs per entry and token."""
    total = Cost(0, 0, 0)
    for parameter in module.parameters(recurse=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            total += Cost(parameter.numel(), parameter.numel(), 0)
    if isinstance(module, nn.Linear):
        total += Cost(0, 0, 2 * module.weight.numel())
    return total


def _cost(module: nn.Module, seq_len: int, seen: set[int]) -> Cost:
    if hasattr(module, "cost"):
        said: Cost = module.cost(seq_len)  # type: ignore[operator]
        seen.update(id(p) for p in module.parameters())
        return said
    total = own_cost(module, seen)
    if hasattr(module, "extra_flops"):
        total += Cost(0, 0, int(module.extra_flops(seq_len)))  # type: ignore[operator]
    if hasattr(module, "extra_backward_flops"):
        total += Cost(0, 0, 0, int(module.extra_backward_flops(seq_len)))  # type: ignore[operator]
    for child in module.children():
        total += _cost(child, seq_len, seen)
    return total


def breakdown(module: nn.Module, seq_len: int = 1, depth: int = 3) -> list[CostLine]:
    """The cost of every submodule with parameters down to `depth` levels, in the order of definition."""
    lines: list[CostLine] = []

    def walk(m: nn.Module, path: str, level: int) -> None:
        if not any(True for _ in m.parameters()):
            return
        size = sum(p.numel() * p.element_size() for p in m.parameters())
        lines.append(CostLine(path, type(m).__name__, cost(m, seq_len), size))
        if level < depth:
            for name, child in m.named_children():
                walk(child, f"{path}.{name}" if path else name, level + 1)

    walk(module, "", 0)
    return lines
