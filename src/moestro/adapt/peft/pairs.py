"""Factors in PEFT's order of rows, and ours: A expert-major, B rank-major; gate and up fused into one."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Pair", "flat", "fuse", "pad", "stacked", "unfuse"]

Pair = tuple[Tensor, Tensor]
"""A [E, r, I] and B [E, O, r] of one stack of matrices, or [r, I] and [O, r] of one matrix."""


def flat(pair: Pair) -> Pair:
    """A [E r, I], rows of expert 0 first; B [O, r E], columns of rank 0 (all experts) first: PEFT's `ParamWrapper`."""
    a, b = pair
    return a.reshape(-1, a.shape[-1]).contiguous(), b.permute(1, 2, 0).reshape(b.shape[1], -1).contiguous()


def stacked(a: Tensor, b: Tensor, num_experts: int) -> Pair:
    """The inverse of `flat`."""
    rank = a.shape[0] // num_experts
    return a.reshape(num_experts, rank, -1), b.reshape(b.shape[0], rank, num_experts).permute(2, 0, 1).contiguous()


def pad(pair: Pair, rank: int) -> Pair:
    """The same update at a higher rank, with zeros."""
    a, b = pair
    more = rank - a.shape[-2]
    return torch.nn.functional.pad(a, (0, 0, 0, more)), torch.nn.functional.pad(b, (0, more))


def fuse(gate: Pair | None, up: Pair | None, width: int) -> Pair:
    """One pair for the fused [gate; up] matrix, of the sum of both ranks: B is block-diagonal."""
    some = gate or up
    assert some is not None
    E, _, I = some[0].shape
    first = some[0].new_zeros(E, 0, I), some[1].new_zeros(E, width, 0)
    (a1, b1), (a2, b2) = gate or first, up or first
    top = torch.nn.functional.pad(b1, (0, b2.shape[2]))
    bottom = torch.nn.functional.pad(b2, (b1.shape[2], 0))
    return torch.cat([a1, a2], 1), torch.cat([top, bottom], 1)


def unfuse(pair: Pair, rank: int) -> tuple[Pair, Pair] | None:
    """Gate's and up's own pairs of rank `rank`, or None where the fused pair is none that `fuse` makes of such."""
    a, b = pair
    width = b.shape[1] // 2
    if a.shape[1] < 2 * rank or bool(a[:, 2 * rank :].any()) or bool(b[:, :, 2 * rank :].any()):
        return None
    if bool(b[:, :width, rank : 2 * rank].any()) or bool(b[:, width:, :rank].any()):
        return None
    gate = a[:, :rank].contiguous(), b[:, :width, :rank].contiguous()
    return gate, (a[:, rank : 2 * rank].contiguous(), b[:, width:, rank : 2 * rank].contiguous())
