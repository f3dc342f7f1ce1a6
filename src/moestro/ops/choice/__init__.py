"""Committing a routing decision, and activation checkpointing that keeps it.

`commit` marks the point where a decision (who goes where) becomes final. It is a registered op whose integer outputs
`moestro.checkpoint` saves, so that recomputation re-reads the decision instead of taking it again; weights are still
recomputed, so gradients flow. Under any other checkpointing the op finds itself inside a backward pass and says so.
"""

from .checkpoint import checkpoint, checkpoint_context, saving_choices
from .commit import commit, in_backward

__all__ = ["checkpoint", "checkpoint_context", "commit", "in_backward", "saving_choices"]
