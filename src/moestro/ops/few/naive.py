"""The same in float64."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attend_one", "linears", "rms_norm"]


def linears(x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(x.double() @ w.double().T + (0.0 if b is None else b.double()) for w, b in zip(weights, biases))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def turn(x: Tensor, angle: Tensor, factor: float, interleaved: bool) -> Tensor:
    """Pairs as complex numbers, times factor * e^(i angle). Shapes: x [..., d], angle [r]."""
    r = len(angle)
    pair, rest = x[..., : 2 * r].double(), x[..., 2 * r :].double()
    pair = pair.unflatten(-1, (r, 2)) if interleaved else pair.unflatten(-1, (2, r)).transpose(-1, -2)
    made = torch.view_as_complex(pair.contiguous()) * torch.polar(torch.full_like(angle, factor), angle)
    made = torch.view_as_real(made)
    made = made.flatten(-2) if interleaved else made.transpose(-1, -2).flatten(-2)
    return torch.cat((made, rest), dim=-1)


def attend_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key: Tensor,
    value: Tensor,
    held: int,
    *,
    first: int = 0,
    norms: tuple[Tensor, Tensor, float] | None = None,
    scale: float | None = None,
    position: int = 0,
    frequency: Tensor | None = None,
    factor: float = 1.0,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output [B, 1, H, d], the key and the value as they are written [B, 1, G, d])."""
    q, k, v = q.double(), k.double(), v.double()
    if norms is not None:
        q, k = rms_norm(q, norms[0], norms[2]), rms_norm(k, norms[1], norms[2])
    if frequency is not None:
        angle = position * frequency.double()
        q, k = turn(q, angle, factor, interleaved), turn(k, angle, factor, interleaved)
    groups = q.shape[2] // key.shape[1]
    keys = torch.cat((key[:, :, first:held].double(), k.transpose(1, 2)), 2).repeat_interleave(groups, 1)
    values = torch.cat((value[:, :, first:held].double(), v.transpose(1, 2)), 2).repeat_interleave(groups, 1)
    scores = (q.transpose(1, 2) @ keys.transpose(2, 3)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores.softmax(-1) @ values).transpose(1, 2), k, v
