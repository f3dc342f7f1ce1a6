"""Activation checkpointing that saves routing decisions and recomputes everything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from .commit import COMMIT

__all__ = ["checkpoint", "checkpoint_context", "saving_choices"]

R = TypeVar("R")


def _choices_only(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op == COMMIT else CheckpointPolicy.PREFER_RECOMPUTE


def saving_choices(policy: Callable[..., CheckpointPolicy]) -> Callable[..., CheckpointPolicy]:
    """Your selective checkpointing policy, with routing decisions saved as well.

    For `torch.utils.checkpoint.create_selective_checkpoint_contexts`.
    """

    def both(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op == COMMIT else policy(ctx, op, *args, **kwargs)

    return both


def checkpoint_context() -> tuple[Any, Any]:
    """A `context_fn` for non-reentrant `torch.utils.checkpoint` that saves routing decisions only."""
    return create_selective_checkpoint_contexts(_choices_only)


def checkpoint(function: Callable[..., R], *args: Any, **kwargs: Any) -> R:
    """Call `function(*args, **kwargs)`, keep its inputs and routing decisions, recompute the rest in backward."""
    return torch_checkpoint(
        function,
        *args,
        use_reentrant=False,
        context_fn=checkpoint_context,
        preserve_rng_state=True,
        **kwargs,
    )  # type: ignore[return-value]
