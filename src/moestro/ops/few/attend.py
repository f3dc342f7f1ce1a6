"""Attention of one new token per sequence, over the buffers of a cache: turn, write, attend, in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import kernels, ready

__all__ = ["attend_one"]


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
) -> Tensor | None:
    """The output of attention, or None where it does not apply, and then nothing was written.

    Shapes: q [B, 1, H*d], k, v [B, 1, G*d] with H a multiple of G, before norms and rotation; key, value [B, G, C, d],
    of whose C places `held` < C are filled; frequency [r] with 2r <= d, or None for no rotation -> [B, 1, H*d].
    norms: weights [d] and epsilon of the root-mean-square norms that heads of q and of k pass before they are turned.
    Writes the turned k and v to place `held` and looks at the places from `first` to it. scale None = 1 / sqrt(d).
    position: of the new token, equal in all sequences; the first 2r entries turn by position * frequency, see
    `nn.rotary`, and are multiplied by `factor`.
    """
    library = kernels(q)
    if library is None:
        return None
    B, G, size, d = key.shape
    H = q.shape[2] // d
    if q.shape != (B, 1, H * d) or k.shape != (B, 1, G * d) or v.shape != k.shape:
        return None
    if H % G or value.shape != key.shape or held >= size or not ready(q, k, v, key, value, frequency):
        return None
    q_norm, k_norm, eps = (None, None, 0.0) if norms is None else norms
    if q_norm is not None and (q_norm.shape != (d,) or k_norm.shape != (d,) or not ready(q_norm, k_norm)):  # type: ignore[union-attr]
        return None
    half = 0 if frequency is None else frequency.shape[0]
    y = torch.empty_like(q)
    scratch = q.new_empty(B * H * (d + held + 1) + 2 * half + d)
    library.moestro_attend_one(
        y.data_ptr(),
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        B,
        H,
        G,
        d,
        size,
        held,
        first,
        None if q_norm is None else q_norm.data_ptr(),
        None if k_norm is None else k_norm.data_ptr(),
        eps,
        None if frequency is None else frequency.data_ptr(),
        half,
        factor,
        position,
        interleaved,
        d**-0.5 if scale is None else scale,
        scratch.data_ptr(),
        torch.get_num_threads(),
    )
    return y
