"""Stateless randomness: every draw is a hash of (seed, step, pass, module path, global unit id).

A generator would be advanced again by recomputation and differently by another number of ranks; a hash gives the same
draw for the same unit, always. The mixing function works on 32-bit words kept in int64 lanes, so that the same integers
come out of CPU, GPU and compiled code.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

__all__ = ["fold", "gumbel", "normal", "permutation", "uniform"]

_MASK = 0xFFFFFFFF
_M1, _M2 = 0x7FEB352D, 0x846CA68B


def _mix(h):  # type: ignore[no-untyped-def]
    """A bijective mix of a 32-bit word (int or int64 tensor)."""
    h = h & _MASK
    h = h ^ (h >> 16)
    h = (h * _M1) & _MASK
    h = h ^ (h >> 15)
    h = (h * _M2) & _MASK
    return h ^ (h >> 16)


def _name(text: str) -> int:
    """32-bit FNV-1a hash of a name, in integer arithmetic that torch.compile can trace (it cannot trace zlib)."""
    h = 0x811C9DC5
    for byte in text.encode():
        h = ((h ^ byte) * 0x01000193) & _MASK
    return h


def fold(seed: Tensor | int, what: str | int) -> Tensor | int:
    """A new 62-bit seed from a seed and a name or number. Plain integers stay plain integers."""
    if isinstance(seed, Tensor) or torch.compiler.is_compiling():
        return _fold(seed, what)
    return _remembered(seed, what)


def _fold(seed: Tensor | int, what: str | int) -> Tensor | int:
    word = _name(what) if isinstance(what, str) else int(what)
    low, high = seed & _MASK, (seed >> 32) & 0x3FFFFFFF
    low2 = _mix(low ^ _mix(word & _MASK))
    high2 = _mix(high ^ low2 ^ _mix((word >> 32) & _MASK)) & 0x3FFFFFFF
    return (high2 << 32) | low2


_remembered = functools.lru_cache(maxsize=4096)(_fold)  # decoding folds the same names into the same seed all the time


def _words(seed: Tensor | int, unit: Tensor, n: int, stream: int) -> Tensor:
    """[T, n] int64 holding 32 random bits each."""
    low, high = seed & _MASK, (seed >> 32) & _MASK
    lane = torch.arange(n, device=unit.device, dtype=torch.int64)
    h = _mix((unit & _MASK) ^ low)
    h = _mix(h ^ ((unit >> 32) & _MASK) ^ high)
    h = _mix(h[:, None] + lane[None, :] * 0x9E3779B9 + stream * 0x632BE5AB)
    return _mix(h ^ low)


def uniform(seed: Tensor | int, unit: Tensor, n: int, *, dtype: torch.dtype = torch.float32, stream: int = 0) -> Tensor:
    """[T, n] numbers in the open interval (0, 1), one row per unit id in `unit` [T] int64."""
    if dtype == torch.float64:
        a, b = _words(seed, unit, n, 2 * stream), _words(seed, unit, n, 2 * stream + 1)
        return ((a << 20 | b & 0xFFFFF).to(torch.float64) + 0.5) * 2.0**-52
    return ((_words(seed, unit, n, 2 * stream) >> 9).to(torch.float32) + 0.5) * 2.0**-23


def normal(seed: Tensor | int, unit: Tensor, n: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """[T, n] standard normal numbers (Box-Muller)."""
    u, v = (uniform(seed, unit, n, dtype=dtype, stream=s) for s in (1, 2))
    return torch.sqrt(-2.0 * torch.log(u)) * torch.cos(2.0 * math.pi * v)


def gumbel(seed: Tensor | int, unit: Tensor, n: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """[T, n] standard Gumbel numbers."""
    return -torch.log(-torch.log(uniform(seed, unit, n, dtype=dtype, stream=3)))


def permutation(seed: Tensor | int, n: int, device: torch.device | str | None = None) -> Tensor:
    """[n] int64, a random permutation; ties of the hash are broken by index."""
    unit = torch.arange(n, device=device, dtype=torch.int64)
    return torch.sort(_words(seed, unit, 1, 8)[:, 0], stable=True).indices
