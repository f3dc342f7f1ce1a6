"""The one comparison of tensors: relative L2 error, reported by name."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["assert_close", "relative_error"]


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| in float64 over all entries; the plain |got| where the reference is zero or empty."""
    difference = torch.linalg.vector_norm(got.detach().double().cpu() - want.detach().double().cpu())
    size = torch.linalg.vector_norm(want.detach().double().cpu())
    return float(difference / size) if float(size) > 0 else float(difference)


def assert_close(name: str, got: Tensor | None, want: Tensor, tol: float = 1e-5, *, dtype: bool = False) -> None:
    """Raise `AssertionError` unless `got` has the shape of `want` and a relative L2 error of at most `tol`.

    A NaN or an infinity in `got` is a failure; so is a missing tensor. Precisions may differ, because references are
    float64; dtype=True demands the same one. Integers and booleans must be equal.
    """
    if got is None:
        raise AssertionError(f"{name}: there is no tensor (a gradient that was never written?)")
    if got.shape != want.shape:
        raise AssertionError(f"{name}: shape {list(got.shape)}, expected {list(want.shape)}")
    if got.is_floating_point() != want.is_floating_point() or (dtype and got.dtype != want.dtype):
        raise AssertionError(f"{name}: dtype {got.dtype}, expected {want.dtype}")
    if not got.is_floating_point():
        wrong = int((got.cpu() != want.cpu()).sum())
        if wrong:
            raise AssertionError(f"{name}: {wrong} of {got.numel()} entries differ")
        return
    bad = int((~torch.isfinite(got)).sum())
    if bad:
        raise AssertionError(f"{name}: {bad} of {got.numel()} entries are not finite")
    error = relative_error(got, want)
    if not error <= tol:
        raise AssertionError(f"{name}: relative error {error:.3g} over {tol:.3g} ({list(got.shape)}, {got.dtype})")
