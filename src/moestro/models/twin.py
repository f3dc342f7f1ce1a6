"""The dense twin: a decoder with a dense feed-forward layer of equal active FLOPs in place of every routed one."""

from __future__ import annotations

from typing import Any

from ..core.errors import UserError
from ..moe.config import MoELayer
from ..nn.config import FeedForward
from .config import Decoder

__all__ = ["TOLERANCE", "dense_twin", "twin_width"]

TOLERANCE = 0.01  # of forward FLOPs per token


def twin_width(layer: MoELayer, dim: int, seq_len: int = 1) -> int:
    """Width of the dense gated MLP whose forward FLOPs per token are those of the routed layer, router included.

    A multiple of 8, 4 or 2 where that is within 1 percent, else the nearest whole number.
    """
    flops = layer.flops_per_token(seq_len, dim=dim)
    per_width = 6 * dim  # gate, up and down, two FLOPs per multiply-add
    for step in (8, 4, 2, 1):
        width = max(step, step * round(flops / per_width / step))
        if abs(width * per_width - flops) <= TOLERANCE * flops:
            return width
    return max(1, round(flops / per_width))


def dense_twin(config: Decoder, seq_len: int | None = None) -> Decoder:
    """The config of the dense twin at sequences of `seq_len` tokens (default: the context).

    Forward FLOPs per token agree within 1 percent, layer by layer unless a layer is very narrow. All other parameters
    keep name and shape, so that both models start from equal shared values. Raises `UserError` where the decoder has no
    routed layer, or is so small that no whole widths give 1 percent.
    """
    seq_len = config.context if seq_len is None else seq_len
    blocks = config.resolved()
    if not any(isinstance(b.ffn, MoELayer) for b in blocks):
        raise UserError("dense_twin: this decoder has no routed layer; it is its own twin")
    dense = tuple(
        b.replace(ffn=FeedForward(width=twin_width(b.ffn, config.dim, seq_len), activation=_activation(b.ffn)))
        if isinstance(b.ffn, MoELayer)
        else b
        for b in blocks
    )
    plain = config.replace(moe=None, layout=None, num_experts=None, blocks=None)
    alike = all(b == dense[0] for b in dense) and isinstance(dense[0].ffn, FeedForward)
    if alike and isinstance(dense[0].ffn, FeedForward) and config.blocks is None:
        twin = plain.replace(ffn=dense[0].ffn)
    else:
        twin = plain.replace(blocks=dense)
    want, got = (c.flops_per_token(seq_len) for c in (config, twin))
    if abs(got - want) > TOLERANCE * want:
        raise UserError(
            f"dense_twin: the nearest twin takes {got} FLOPs per token, the sparse model {want}: over 1 percent apart; "
            "use wider experts"
        )
    return twin


def _activation(layer: MoELayer) -> Any:
    return getattr(layer.experts, "activation", "silu")
