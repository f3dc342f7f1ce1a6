"""Where experts can stand in an encoder that was there before them: on it, in blocks on top of it, or inside it.

Configs only, no torch. Source: Robust QA with MoE (arXiv 2204.09598), whose code has the first two and whose text
speaks of the third.
"""

from __future__ import annotations

from collections.abc import Collection

from ..core.errors import UserError
from ..experts.config import MLP
from ..losses.config import SequenceBalance, SwitchBalance
from ..moe.config import MoELayer
from ..nn.config import LayerNorm, Mixer
from ..routers.config import Capacity, FirstChoices, Linear, RandomSecond, Raw, Renormalised, Router, TopK
from .config import Block, Encoder, Headed
from .heads_config import Head, SpanHead

__all__ = ["blocks_on_top", "experts_inside", "experts_on_top", "gshard_layer", "switch_layer"]


def gshard_layer(num_experts: int = 16, width: int = 3072, *, as_released: bool = False) -> MoELayer:
    """Top-2 experts of LeakyReLU as in GShard: a random second choice, room by sequence, first choices served first.

    The second choice is kept with probability min(1, share / 0.2), its share of the two weights. An expert takes at
    most max(4, floor(1.25 n / E)) tokens of a sequence of n, in evaluation floor(2 n / E). Balance: the mean over
    sequences of E sum_e F_e P_e, F of first choices.

    as_released (code of 13): second choices are dropped at random in evaluation too; the loss counts fully, its
    coefficient being ignored; and the gate begins with N(0, 1), so that nearly all weight is on one expert.
    """
    room = Capacity(
        factor=0.625,  # of K n / E, K = 2
        eval_factor=1.0,
        min_capacity=4,
        priority=FirstChoices(),
        per="segment",
        rounding="down",
    )
    return MoELayer(
        num_experts=num_experts,
        router=Router(
            score=Linear(init_std=1.0 if as_released else None),
            select=TopK(k=2),
            weigh=Renormalised(epsilon=1e-9),
            limit=RandomSecond(threshold=0.2, when="always" if as_released else "train", then=room),
        ),
        experts=MLP(width=width, activation="leaky_relu"),
        losses=(SequenceBalance(coefficient=1.0 if as_released else 0.01, of="first"),),
    )


def switch_layer(num_experts: int = 16, width: int = 3072, *, as_released: bool = False) -> MoELayer:
    """One expert per token by a gate with a bias, its probability as weight, nothing dropped; experts with biases.

    as_released (code of 13): all experts of a layer begin as copies of one.
    """
    return MoELayer(
        num_experts=num_experts,
        router=Router(score=Linear(bias=True), select=TopK(k=1), weigh=Raw()),
        experts=MLP(width=width, activation="relu", bias=True, alike=as_released),
        losses=(SwitchBalance(coefficient=0.01),),
    )


def experts_on_top(encoder: Encoder, layer: MoELayer | None = None, head: Head | None = None) -> Headed:
    """Variant A of 13: a routed layer (default: `gshard_layer`, four times as wide as the model) on the encoder's
    output, whose own output the head reads, without residual or norm; a token that it drops is the zero vector there.
    """
    layer = gshard_layer(width=4 * encoder.dim) if layer is None else layer
    return Headed(encoder=encoder, head=head or SpanHead(), top=layer, seed=encoder.seed)


def blocks_on_top(
    encoder: Encoder,
    layer: MoELayer | None = None,
    count: int = 8,
    mixer: Mixer | None = None,
    dropout: float = 0.2,
) -> Encoder:
    """Variant B of 13: `count` more pre-norm blocks with a routed layer each (default: `switch_layer`, four times as
    wide as the model), and a norm at the end. mixer: default that of the encoder's last block."""
    layer = switch_layer(width=4 * encoder.dim) if layer is None else layer
    blocks = encoder.resolved()
    more = Block(mixer=mixer or blocks[-1].mixer, ffn=layer, norm=LayerNorm(), dropout=dropout)
    return _of_blocks(encoder, (*blocks, *(more,) * count))


def experts_inside(encoder: Encoder, places: Collection[int], layer: MoELayer | None = None) -> Encoder:
    """The feed-forward layers of the blocks `places` replaced by routed ones (default: `switch_layer`, four times as
    wide as the model), everything round them as it was."""
    layer = switch_layer(width=4 * encoder.dim) if layer is None else layer
    blocks = encoder.resolved()
    for place in places:
        if not 0 <= place < len(blocks):
            raise UserError(f"experts_inside: there is no block {place}; the encoder has 0..{len(blocks) - 1}")
    return _of_blocks(encoder, tuple(b.replace(ffn=layer) if i in places else b for i, b in enumerate(blocks)))


def _of_blocks(encoder: Encoder, blocks: tuple[Block, ...]) -> Encoder:
    return encoder.replace(
        blocks=blocks, num_layers=len(blocks), moe=None, layout=None, num_experts=None, residual_scale=1.0
    )
