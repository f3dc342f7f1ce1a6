"""The state of attention: keys and values of what came before."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.pytree import changed, pytree, static

__all__ = ["KVCache"]


@pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of the tokens so far. `extend` returns the next state; the old one stays readable, but only one
    continuation of it is valid, since both write to the same preallocated buffers. Under autograd nothing is shared.

    Shapes:
        key, value: [B, H', C, d], the first `held` of C places are filled; None before the first token.
        valid: [B, C] bool or None, False = padding. segment: [B, C] int64 or None, which sequence a key belongs to.

    Static: capacity, the most tokens that may be seen; length, tokens seen; held, the newest of them that are kept (all
    without a window; with one, buffers hold about twice the window).
    """

    key: Tensor | None = None
    value: Tensor | None = None
    valid: Tensor | None = None
    segment: Tensor | None = None
    capacity: int = static()
    length: int = static(default=0)
    held: int = static(default=0)

    def extend(
        self,
        key: Tensor,
        value: Tensor,
        valid: Tensor | None = None,
        segment: Tensor | None = None,
        window: int | None = None,
    ) -> KVCache:
        """The state after S more tokens.

        Shapes: key, value [B, H', S, d]; valid, segment [B, S] or None. With a window, keys that no later token can see
        may be forgotten. Raises `UserError` when the capacity is exceeded.
        """
        B, _, S, _ = key.shape
        length = self.length + S
        if length > self.capacity:
            raise UserError(
                f"the attention cache holds {self.capacity} tokens, {length} are needed; make it with a larger capacity"
            )
        if self.key is not None and self.key.shape[0] != B:
            raise UserError(f"the attention cache was begun with {self.key.shape[0]} sequences and now gets {B}")
        keep = self.held if window is None else min(self.held, window - 1)
        grows = torch.is_grad_enabled() and (key.requires_grad or (self.key is not None and self.key.requires_grad))
        size = 0 if self.key is None else self.key.shape[2]
        if self.held + S <= size and not grows:
            keep = self.held
        elif not grows:
            size = self.capacity if window is None else min(self.capacity, max(2 * window, keep + S))

        def joined(old: Tensor | None, new: Tensor, axis: int) -> Tensor:
            kept = None if old is None else old.narrow(axis, self.held - keep, keep)
            if grows:
                return new if kept is None else torch.cat((kept, new), dim=axis)
            if old is not None and keep == self.held and old.shape[axis] == size:
                buffer = old
            else:
                shape = [*new.shape]
                shape[axis] = size
                buffer = new.new_zeros(shape)
                if kept is not None:
                    buffer.narrow(axis, 0, keep).copy_(kept)
            buffer.narrow(axis, keep, S).copy_(new)
            return buffer

        def marks(old: Tensor | None, new: Tensor | None, missing: int) -> Tensor | None:
            if old is None and new is None:
                return None
            dtype = old.dtype if old is not None else new.dtype  # type: ignore[union-attr]
            if new is None:
                new = torch.full((B, S), missing, dtype=dtype, device=key.device)
            if old is None and self.key is not None:
                old = torch.full((B, self.key.shape[2]), missing, dtype=dtype, device=key.device)
            return joined(old, new, 1)

        return changed(
            self,
            key=joined(self.key, key, 2),
            value=joined(self.value, value, 2),
            valid=marks(self.valid, valid, 1),
            segment=marks(self.segment, segment, 0),
            length=length,
            held=keep + S,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers of keys and values."""
        return sum(t.numel() * t.element_size() for t in (self.key, self.value) if t is not None)

    def has_place(self) -> bool:
        """Whether one more token fits into the buffers as they are, and no token needs a mark."""
        if self.key is None or self.valid is not None or self.segment is not None:
            return False
        return self.held < self.key.shape[2] and self.length < self.capacity

    def extended(self) -> KVCache:
        """The state after one more token, whose key and value were written to place `held` of the buffers."""
        return changed(self, length=self.length + 1, held=self.held + 1)

    def seen(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the held tokens, [B, H', held, d]."""
        if self.key is None or self.value is None:
            raise UserError("the attention cache is empty")
        return self.key.narrow(2, 0, self.held), self.value.narrow(2, 0, self.held)

    def marks(self) -> tuple[Tensor | None, Tensor | None]:
        """valid and segment of the held tokens, [B, held] each, or None."""
        return tuple(None if t is None else t.narrow(1, 0, self.held) for t in (self.valid, self.segment))  # type: ignore[return-value]
