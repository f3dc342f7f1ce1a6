"""Attention as an operator on the units."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import UserError

__all__ = ["Kernel", "Operator", "by_head", "mean_map"]

Kernel = Callable[[Tensor], Tensor]


class Operator:
    """v [B*N, C] -> A v [B*S, C], with A a mean over heads of the attention maps: a plain one, or with the weights
    [B*S, H] of each unit's heads. Costs one more call of the attention's kernel, each time it is called."""

    def __init__(self, mapped: Callable[[Tensor, Tensor | None], Tensor], parts: Callable[[], Tensor]) -> None:
        self._mapped, self._parts = mapped, parts

    def __call__(self, value: Tensor, weight: Tensor | None = None) -> Tensor:
        return self._mapped(value, weight)

    def contributions(self) -> Tensor:
        """[B*S, H, D]: what each head adds to the attention's output, in training after dropout of its map."""
        return self._parts()


def mean_map(kernel: Kernel, q: Tensor, k: Tensor, parts: Callable[[], Tensor]) -> Operator:
    """The operator of the attention map that `kernel` applies. parts: makes the heads' contributions.

    Shapes: q [B, H, S, d], k [B, G, N', d] with N' <= N keys, those of the last units; kernel [B, G, N', d] ->
    [B, H, S, d].
    """
    B, H, S, d = q.shape
    held = k.shape[2]

    def attend(value: Tensor, weight: Tensor | None) -> Tensor:
        if value.ndim != 2 or value.shape[0] % B or value.shape[0] < B * held:
            raise UserError(
                f"attend takes v [B*N, C] with B {B} sequences and N >= {held} units each, not {list(value.shape)}"
            )
        C = value.shape[1]
        v = value.view(B, -1, C)[:, -held:].to(q.dtype)
        # The fast kernels want values as wide as queries.
        v = F.pad(v, (0, -C % d))[:, None].expand(-1, k.shape[1], -1, -1)
        each = [kernel(part) for part in v.split(d, dim=-1)]
        if weight is None:
            each = [part.mean(1) for part in each]
        else:
            share = weight.view(B, S, H).transpose(1, 2)[..., None].to(q.dtype)
            each = [(part * share).sum(1) for part in each]
        return torch.cat(each, dim=-1)[..., :C].reshape(B * S, C).to(value.dtype)

    return Operator(attend, parts)


def by_head(y: Tensor, out: nn.Module) -> Tensor:
    """[B*S, H, D]: the output map on each head alone, without its bias. y: [B, S, H, d], what the heads gave."""
    H, d = y.shape[2:]
    if type(out) is nn.Linear:
        return torch.einsum("bshd,ohd->bsho", y, out.weight.view(-1, H, d)).flatten(0, 1)
    alone = y[:, :, None] * torch.eye(H, dtype=y.dtype, device=y.device)[:, :, None]
    return (out(alone.flatten(3)) - out(y.new_zeros(H * d))).flatten(0, 1)
