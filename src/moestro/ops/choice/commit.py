"""The op `moestro::commit`."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.errors import RecomputationError, UserError

__all__ = ["COMMIT", "commit", "in_backward"]

_LIBRARY = torch.library.Library("moestro", "FRAGMENT")
_LIBRARY.define("commit(Tensor choice) -> Tensor")

REMEDY = (
    "a routing decision was about to be taken again inside a backward pass: activation checkpointing without saved "
    "choices would send recomputed tokens to other experts and give wrong gradients. Use moestro.checkpoint(fn, ...) "
    "in place of torch.utils.checkpoint.checkpoint, or hand it moestro.checkpoint_context as context_fn (with "
    "use_reentrant=False); for a transformers model: model.gradient_checkpointing_enable("
    'gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": moestro.checkpoint_context})'
)


def in_backward() -> bool:
    """Whether the caller runs inside an autograd backward pass, where a forward can only be a recomputation."""
    return torch._C._current_graph_task_id() != -1


def _commit(choice: Tensor) -> Tensor:
    if in_backward():
        raise RecomputationError(REMEDY)
    return choice.clone()


_LIBRARY.impl("commit", _commit, "CompositeExplicitAutograd")


@torch.library.register_fake("moestro::commit")
def _(choice: Tensor) -> Tensor:
    return torch.empty_like(choice)


COMMIT = torch.ops.moestro.commit.default


def commit(choice: Tensor) -> Tensor:
    """The same integers or booleans, marked as a decision to be saved rather than recomputed.

    Raises `RecomputationError` when it runs inside a backward pass, that is: under checkpointing that did not save it.
    """
    if choice.is_floating_point():
        raise UserError("commit takes decisions, that is integers or booleans; weights are to be recomputed")
    return COMMIT(choice)
