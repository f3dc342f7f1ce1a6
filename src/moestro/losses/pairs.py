"""Losses on pairs of embeddings whose negatives are the other pairs of their group."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import UserError
from . import pair_config as cfg

__all__ = ["MNRLoss", "MNRPlusLoss"]


class MNRLoss:
    """-log softmax_j(a_i . b_j / temperature) at j = i, for each pair i.

    Shapes: a, b [..., n, D] -> [..., n] nats, in fp32 (float64 for it); groups are the leading axes. Source: Henderson
    et al. 2017 (arXiv 1705.00652), section 4; mnr of 34 (arXiv 2401.15713). With `symmetric` the mean with the same
    for a_j and b_i: Radford et al. 2021 (CLIP).
    """

    def __init__(self, config: cfg.MNR) -> None:
        self.config = config

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        (a, b), config = _read(self.config, a, b), self.config
        with torch.autocast(a.device.type, enabled=False):
            scores = a @ b.mT / config.temperature
            nats = _own(scores)
            return (nats + _own(scores.mT)) / 2 if config.symmetric else nats


class MNRPlusLoss:
    """1/2 [CE(A B^T, t) + CE((A B^T)^T, t')] with t_i = argmax_j T_ij, t'_i = argmax_j T_ji, T = softmax over rows of
    (A A^T + B B^T) / 2, all divided by the temperature.

    Shapes: a, b [..., n, D] -> [..., n] nats, in fp32 (float64 for it). Targets have no gradient. With rows of equal
    length they are the diagonal, and this is the symmetric `MNRLoss`. Source: 34 (arXiv 2401.15713), mnr_plus, which
    its first version calls clip.
    """

    def __init__(self, config: cfg.MNRPlus) -> None:
        self.config = config

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        (a, b), tau = _read(self.config, a, b), self.config.temperature
        with torch.autocast(a.device.type, enabled=False):
            with torch.no_grad():
                near = torch.softmax((a @ a.mT + b @ b.mT) / (2 * tau), dim=-1)
                forth, back = near.argmax(-1), near.mT.argmax(-1)
            scores = a @ b.mT / tau
            return (_at(scores, forth) + _at(scores.mT, back)) / 2


def _read(config: cfg.PairLoss, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.shape != b.shape or a.ndim < 2:
        raise UserError(
            f"{type(config).__name__}: needs two tables of embeddings [..., n, D] of one shape, not {list(a.shape)} "
            f"and {list(b.shape)}"
        )
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    a, b = a.to(wide), b.to(wide)
    return (F.normalize(a, dim=-1), F.normalize(b, dim=-1)) if config.normalised else (a, b)


def _own(scores: Tensor) -> Tensor:
    return torch.logsumexp(scores, dim=-1) - scores.diagonal(dim1=-2, dim2=-1)


def _at(scores: Tensor, target: Tensor) -> Tensor:
    return torch.logsumexp(scores, dim=-1) - scores.gather(-1, target[..., None])[..., 0]
