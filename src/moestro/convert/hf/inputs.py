"""From what transformers' models are called with to signals and targets."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...core.draws import fold
from ...core.errors import UserError
from ...core.pytree import changed
from ...core.signals import Signals

__all__ = ["signals_of", "targets_of"]

IGNORED = -100


def signals_of(
    x: Tensor,
    mask: Tensor | None,
    position_ids: Tensor | None,
    *,
    given: Signals | None = None,
    past: int = 0,
    training: bool = False,
    quiet: bool = False,
) -> Signals:
    """The signals of a pass over x [B, S, ...] after `past` tokens; those that are given come first.

    What would say nothing (a mask without padding, positions that count from `past`) is left out: without them
    attention has faster paths. In training without a given seed, one is drawn from torch's generator, so that random
    routers draw anew in every pass and `set_seed` repeats them; ranks draw differently.
    """
    B, S = x.shape[:2]
    found: dict[str, Tensor] = {}
    valid = position = None
    if mask is not None:
        if mask.ndim != 2 or tuple(mask.shape) != (B, past + S):
            raise UserError(
                f"attention_mask {list(mask.shape)}: expected [{B}, {past + S}], one entry per token so far, 0 = "
                "padding; other masks are the decoder's own matter (packed sequences: position_ids that start over)"
            )
        real = mask != 0
        if not bool(real.all()):
            valid, position = real[:, past:], (real.long().cumsum(1) - 1).clamp_min(0)[:, past:]
    if position_ids is not None:
        position = position_ids.expand(B, S)
        if mask is None and past == 0:
            found |= _packed(position)
    plain = torch.arange(past, past + S, device=x.device).expand(B, S)
    if valid is not None and not bool(valid.all()):
        found["valid"] = valid.reshape(-1)
    if position is not None and not torch.equal(position, plain):
        found["position"] = position.reshape(-1)
    signals = Signals() if given is None else given
    found = {name: value for name, value in found.items() if getattr(signals, name) is None}
    seed = _seed() if training and given is None else signals.seed
    return changed(signals, **found, seed=seed, quiet=quiet or signals.quiet)


def _packed(position: Tensor) -> dict[str, Tensor]:
    """Segments and unit ids of rows that hold several sequences, one after the other; nothing for rows of one."""
    starts = torch.zeros_like(position)
    starts[:, 1:] = position[:, 1:] != position[:, :-1] + 1
    if not bool(starts.any()):
        return {}
    B, S = position.shape
    row = torch.arange(B, device=position.device)[:, None]
    column = torch.arange(S, device=position.device)
    return {"segment": (starts.cumsum(1) + row * S).reshape(-1), "unit_id": ((row << 32) | column).reshape(-1)}


def _seed() -> int:
    drawn = int(torch.randint(2**62, (), device="cpu"))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return int(fold(drawn, torch.distributed.get_rank()))
    return drawn


def targets_of(labels: Tensor | None, shifted: Tensor | None, valid: Tensor | None, logits: Tensor) -> Tensor:
    """[B, S] int64, what each position is to predict: labels one place to the left; -100 where padding is either side.

    labels [B, S], or shifted [B, S] ready-made; valid: flat [B * S] or None.
    """
    if shifted is None:
        assert labels is not None
        hidden = labels if valid is None else labels.masked_fill(~valid.view(labels.shape), IGNORED)
        shifted = F.pad(hidden, (0, 1), value=IGNORED)[:, 1:]
    if shifted.shape != logits.shape[:2]:
        raise UserError(
            f"labels {list(shifted.shape)} for logits {list(logits.shape[:2])}; give one label per token and leave "
            "logits_to_keep out"
        )
    if valid is not None:
        shifted = shifted.masked_fill(~valid.view(shifted.shape), IGNORED)
    return shifted.contiguous()
