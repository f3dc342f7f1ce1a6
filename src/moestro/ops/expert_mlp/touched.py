"""Gradients of touched experts only: expert parameters' gradients as sparse tensors over the expert axis."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...core.errors import UserError
from . import native
from .problem import Grads, Problem, Wanted

__all__ = ["check_sparse", "compact", "sparse"]


def check_sparse() -> None:
    """Raise `UserError` where sparse gradients cannot be used: under torch.compile, and with several ranks, whose
    gradient reductions (DDP, FSDP) want the gradient of every expert on every rank."""
    if torch.compiler.is_compiling():
        raise UserError("sparse_grad: gradients of touched experts only cannot be compiled; leave torch.compile out")
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise UserError(
            f"sparse_grad: of {dist.get_world_size()} ranks every one needs the gradients of all experts; leave it out"
        )


def compact(backend: Any, p: Problem, hidden: Tensor, grad: Tensor, wanted: Wanted) -> tuple[Grads, Tensor]:
    """The gradients with those of parameters for touched experts only, [N, ...], and which those are, [N] int64."""
    counts = p.offsets.diff()
    touched = counts.nonzero()[:, 0]
    if backend is native:
        place = torch.where(counts > 0, (counts > 0).cumsum(0) - 1, -1)
        return native.backward(p, hidden, grad, wanted, place), touched
    grads = backend.backward(p, hidden, grad, wanted)
    cut = {n: t if t is None else t.index_select(0, touched) for n, t in grads._asdict().items() if n not in _UNITS}
    return grads._replace(**cut), touched


_UNITS = ("x", "weight")


def sparse(values: Tensor, touched: Tensor, like: Tensor) -> Tensor:
    """values [N, ...] at the places `touched` of a sparse tensor of the shape of `like`."""
    return torch.sparse_coo_tensor(touched[None], values, like.shape, is_coalesced=True, check_invariants=False)
