"""Drop policies: in which order choices are served, and what becomes of those that find no room."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.draws import fold, uniform
from . import config as cfg
from .steps import Scores, Step
from .weigh import chosen

__all__ = [
    "BatchPrioritisedPriority",
    "FirstChoicesPriority",
    "PositionPriority",
    "PriorityStep",
    "ProbabilityPriority",
    "RecyclePriority",
    "Room",
    "serve",
]


class Room(NamedTuple):
    """Who competes for what. Buckets are (group, expert) pairs, group * E + expert.

    group: [T] int64. limit: [G] int64, room of each expert of a group. most: a static bound of it. num_experts: E.
    """

    group: Tensor
    limit: Tensor
    most: int
    num_experts: int

    def bucket(self, expert: Tensor, takes_part: Tensor) -> Tensor:
        """[T, K] int64; whoever takes no part is in a bucket behind all others."""
        inside = self.group[:, None] * self.num_experts + expert
        return torch.where(takes_part, inside, self.limit.shape[0] * self.num_experts)

    def fits(self, place: Tensor) -> Tensor:
        """[T, K] bool: whether a place in its bucket (from 0) is inside the limit of the unit's group."""
        return place < self.limit[self.group][:, None]


def serve(bucket: Tensor, order: Tensor) -> Tensor:
    """[T, K] place of each choice in its bucket (0 = first), if choices are served in `order` [T*K] (flat indices)."""
    queue, index = torch.sort(bucket.reshape(-1)[order], stable=True)
    place = torch.arange(queue.shape[0], device=queue.device) - torch.searchsorted(queue, queue)
    return torch.empty_like(place).scatter(0, order[index], place).view_as(bucket)


class PriorityStep(Step):
    """order: `(expert [T, K], Scores) -> [T*K]` flat indices in the order of service. recycle: who is moved where."""

    causal = False

    def order(self, expert: Tensor, scores: Scores) -> Tensor:
        raise NotImplementedError

    def recycle(
        self, expert: Tensor, kept: Tensor, takes_part: Tensor, room: Room, scores: Scores, seed: Tensor | int
    ) -> tuple[Tensor, Tensor] | None:
        """New (expert, kept), or None where nobody is moved."""
        return None


class PositionPriority(PriorityStep):
    """Unit by unit, each with all its choices. Causal, given the number of units."""

    causal = True

    def __init__(self, config: cfg.ByPosition) -> None:
        super().__init__()

    def order(self, expert: Tensor, scores: Scores) -> Tensor:
        return torch.arange(expert.numel(), device=expert.device)


class FirstChoicesPriority(PriorityStep):
    """First choices of all units, then second choices (GShard, arXiv 2006.16668 algorithm 1)."""

    def __init__(self, config: cfg.FirstChoices) -> None:
        super().__init__()

    def order(self, expert: Tensor, scores: Scores) -> Tensor:
        return torch.arange(expert.numel(), device=expert.device).view(expert.shape).t().reshape(-1)


class ProbabilityPriority(PriorityStep):
    """Highest probability of the choice first; equal ones by unit, then rank."""

    def __init__(self, config: cfg.ByProbability) -> None:
        super().__init__()

    def order(self, expert: Tensor, scores: Scores) -> Tensor:
        value = chosen(scores.probs.detach(), expert).reshape(-1)
        return torch.sort(value, descending=True, stable=True).indices


class BatchPrioritisedPriority(PriorityStep):
    """First choices first; units by their highest probability (V-MoE, arXiv 2106.05974 sec. 3.2)."""

    def __init__(self, config: cfg.BatchPrioritised) -> None:
        super().__init__()

    def order(self, expert: Tensor, scores: Scores) -> Tensor:
        K = expert.shape[1]
        best = chosen(scores.probs.detach(), expert).amax(dim=1)
        unit = torch.sort(best, descending=True, stable=True).indices
        return (unit * K + torch.arange(K, device=expert.device)[:, None]).reshape(-1)


class RecyclePriority(PriorityStep):
    """Choices without room go to random experts of their group that have some and do not serve the unit yet.

    Hunyuan-Large's recycle routing with hashed draws (released code: top-1 and a generator). A draw that meets an
    expert which serves the unit already is repeated up to three times; then the choice is dropped. Where little room is
    left, choices earlier in `order` draw first. The weight is that of the new expert.
    """

    ROUNDS = 4

    def __init__(self, config: cfg.Recycle) -> None:
        super().__init__()
        self.inner: PriorityStep = config.order.build()

    def order(self, expert: Tensor, scores: Scores) -> Tensor:
        return self.inner.order(expert, scores)

    def recycle(
        self, expert: Tensor, kept: Tensor, takes_part: Tensor, room: Room, scores: Scores, seed: Tensor | int
    ) -> tuple[Tensor, Tensor] | None:
        order = self.order(expert, scores)
        for turn in range(self.ROUNDS if expert.shape[1] > 1 else 1):
            waiting = takes_part & ~kept
            offer = _offers(room, expert, takes_part & kept, waiting, order, fold(seed, turn))
            offer = torch.where(waiting, offer, -1)
            settled = torch.where(waiting, -2, expert)
            clash = (offer[:, :, None] == settled[:, None, :]).any(dim=-1)
            earlier = torch.ones(offer.shape[1], offer.shape[1], device=offer.device).tril(-1).bool()
            clash |= ((offer[:, :, None] == offer[:, None, :]) & earlier).any(dim=-1)
            moved = (offer >= 0) & ~clash
            expert, kept = torch.where(moved, offer, expert), kept | moved
        return expert, kept


def _offers(room: Room, expert: Tensor, rows: Tensor, waiting: Tensor, order: Tensor, seed: Tensor | int) -> Tensor:
    """[T, K]: the expert whose free place each waiting choice draws, -1 where its group has none left.

    Every group shuffles its free places; the n-th waiting choice of the group gets the n-th of them.
    """
    G, E, C = room.limit.shape[0], room.num_experts, room.most
    if C == 0:
        return torch.full_like(expert, -1)
    taken = torch.zeros(G * E + 1, dtype=torch.int64, device=expert.device)
    bucket = room.bucket(expert, rows).reshape(-1)
    taken = taken.scatter_add(0, bucket, torch.ones_like(bucket))[:-1].view(G, E, 1)
    place = torch.arange(C, device=expert.device)
    free = (place >= taken) & (place < room.limit.view(G, 1, 1))
    # a draw per (expert, place), so that a wider table, which padding makes, changes none of them
    draw = uniform(seed, torch.arange(G * E, device=expert.device), C).view(G, E * C)
    shuffled = torch.sort(draw.masked_fill(~free.view(G, E * C), 2.0), dim=1, stable=True).indices
    turn = serve(torch.where(waiting, room.group[:, None], G), order).clamp_max(E * C - 1)
    found = shuffled.div(C, rounding_mode="floor")[room.group[:, None], turn]
    return torch.where(turn < free.view(G, -1).sum(1)[room.group][:, None], found, -1)
