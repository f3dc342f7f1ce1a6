"""The dense twin: a model with a dense feed-forward layer of equal active FLOPs in place of every routed one."""

from __future__ import annotations

from typing import Any, TypeVar

from ..core.errors import UserError
from ..moe.config import MoELayer
from ..nn.config import FeedForward
from .config import Decoder, EncoderDecoder, Headed, Stack

__all__ = ["TOLERANCE", "dense_twin", "twin_width"]

M = TypeVar("M", bound=Stack | EncoderDecoder | Headed)
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


def dense_twin(config: M, seq_len: int | None = None) -> M:
    """The config of the dense twin at sequences of `seq_len` tokens (default: the context). config: of a decoder, an
    encoder, both together, or an encoder with a head.

    Forward FLOPs per token agree within 1 percent, layer by layer unless a layer is very narrow. All other parameters
    keep name and shape, so that both models start from equal shared values. Raises `UserError` where the model has no
    routed layer, or is so small that no whole widths give 1 percent.
    """
    if isinstance(config, EncoderDecoder):
        sides: dict[str, Stack] = {"encoder": config.encoder, "decoder": config.decoder}
        routed = {name: side for name, side in sides.items() if _is_routed(side)}
        if not routed:
            raise UserError("dense_twin: this model has no routed layer; it is its own twin")
        return config.replace(**{name: dense_twin(side, seq_len) for name, side in routed.items()})
    if isinstance(config, Headed):
        return _headed(config, seq_len)
    seq_len = config.context if seq_len is None else seq_len
    blocks = config.resolved()
    if not _is_routed(config):
        raise UserError("dense_twin: this model has no routed layer; it is its own twin")
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
        said = {"cross": None, "source_dim": None} if isinstance(config, Decoder) else {}
        twin = plain.replace(blocks=dense, residual_scale=1.0, **said)  # what blocks say themselves
    want, got = (c.flops_per_token(seq_len) for c in (config, twin))
    if abs(got - want) > TOLERANCE * want:
        raise UserError(
            f"dense_twin: the nearest twin takes {got} FLOPs per token, the sparse model {want}: over 1 percent apart; "
            "use wider experts"
        )
    return twin


def _headed(config: Headed, seq_len: int | None) -> Headed:
    encoder, top = config.encoder, config.top
    changes: dict[str, Any] = {"encoder": dense_twin(encoder, seq_len)} if _is_routed(encoder) else {}
    if isinstance(top, MoELayer):
        width = twin_width(top, encoder.dim, encoder.context if seq_len is None else seq_len)
        changes["top"] = FeedForward(width=width, activation=_activation(top))
    if not changes:
        raise UserError("dense_twin: this model has no routed layer; it is its own twin")
    return config.replace(**changes)


def _is_routed(config: Stack) -> bool:
    return any(isinstance(b.ffn, MoELayer) for b in config.resolved())


def _activation(layer: MoELayer) -> Any:
    return getattr(layer.experts, "activation", "silu")
