"""The common router on few tokens: a linear map, an activation, the k highest, their weights, in one call."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..choice import in_backward
from .kernels import FEW, kernels, ready

__all__ = ["Routed", "route"]

ACTIVATIONS = {"softmax": 0, "sigmoid": 1, "identity": 2}
WEIGHTS = {"raw": 0, "renormalised": 1, "kept": 2}


class Routed(NamedTuple):
    """logits, probs: [T, E]. expert: [T, K] int64, highest first. weight: [T, K]."""

    logits: Tensor
    probs: Tensor
    expert: Tensor
    weight: Tensor


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    activation: Literal["softmax", "sigmoid", "identity"],
    weigh: Literal["raw", "renormalised", "kept"],
    scale: float,
) -> Routed | None:
    """The k highest of activation(x W^T + b), equal ones by lower index, and their weights; None where it does not
    apply or where a probability is NaN.

    Shapes: x [T, D], weight [E, D], bias [E] or None. weigh: the probabilities as they are, divided by their sum, or
    the softmax over the chosen logits; times `scale`.
    """
    library = kernels(x)
    if library is None:
        return None
    T, D = x.shape
    E = weight.shape[0]
    if T > FEW or not T or k > E or weight.shape[1] != D or (bias is not None and bias.shape != (E,)):
        return None
    if in_backward() or not ready(x, weight, bias):
        return None
    logits, weights = x.new_empty((T, E)), x.new_empty((T, k))
    made = Routed(logits, torch.empty_like(logits), torch.empty_like(weights, dtype=torch.int64), weights)
    failed = library.moestro_route(
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        logits.data_ptr(),
        made.probs.data_ptr(),
        made.expert.data_ptr(),
        weights.data_ptr(),
        T,
        D,
        E,
        k,
        ACTIVATIONS[activation],
        WEIGHTS[weigh],
        scale,
    )
    return None if failed else made
