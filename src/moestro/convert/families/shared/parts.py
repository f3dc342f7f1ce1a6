"""Pieces of config that many families describe with the same fields of config.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ....core.config import Config
from ....core.errors import UserError
from ....experts.config import Gated
from ....losses.config import Loss, PerUnitBalance
from ....models.config import Block, Decoder
from ....moe.config import MoELayer
from ....nn.config import Attention, FeedForward, RMSNorm
from ....routers.config import Constant, Raw, Renormalised, Router, TopK
from ...checkpoint.fields import Fields

__all__ = [
    "ACTIVATIONS",
    "activation_field",
    "attention_of",
    "balance",
    "balance_coefficient",
    "decoder",
    "dense_of",
    "first_of",
    "heads",
    "normalised",
    "num_layers",
    "one",
    "routed_of",
    "router",
    "write_common",
    "write_decoder",
]

ACTIVATIONS: dict[str, Any] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "leaky_relu": "leaky_relu",
}
"""Names in config.json -> ours."""
_THEIR_ACTIVATION = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
_MOST_LAYERS = 10_000


def activation_field(name: str) -> str:
    """Our name of an activation as config.json has it."""
    return _THEIR_ACTIVATION[name]


def num_layers(fields: Fields, name: str = "num_hidden_layers") -> int:
    count = fields.take(name, int)
    if not 1 <= count <= _MOST_LAYERS:
        raise fields.error(name, f"{count} does not lie between 1 and {_MOST_LAYERS}")
    return count


def heads(fields: Fields, *, kv: int | None = None, head_dim: int | None = None) -> dict[str, Any]:
    """num_heads, num_kv_heads, head_dim for `Attention`. kv, head_dim: the family's defaults, None = as many as heads,
    and dim / heads."""
    count = fields.take("num_attention_heads", int)
    return {
        "num_heads": count,
        "num_kv_heads": fields.take("num_key_value_heads", int, kv or count),
        "head_dim": fields.take("head_dim", int, head_dim),
    }


def router(k: int, normalised: bool) -> Router:
    """A linear softmax router, weights renormalised over the chosen or not."""
    if k == 1 and normalised:
        return Router(select=TopK(k=1), weigh=Constant())  # p / p
    return Router(select=TopK(k=k), weigh=Renormalised() if normalised else Raw())


def normalised(router: Router) -> bool:
    """Whether the router's weights are renormalised over the chosen, `norm_topk_prob`."""
    return isinstance(router.weigh, Renormalised | Constant)


def first_of(blocks: Sequence[Block], kind: type[Config]) -> Block:
    """The first block with an FFN of this kind. Raises `UserError` where there is none."""
    for block in blocks:
        if isinstance(block.ffn, kind):
            return block
    raise UserError(f"layout: no block has a {kind.__name__}, which this family needs")


def balance(fields: Fields, default: float = 0.001) -> tuple[Loss, ...]:
    """Mixtral's balance loss with the coefficient that config.json gives."""
    return (PerUnitBalance(coefficient=fields.take("router_aux_loss_coef", float, default)),)


def balance_coefficient(layer: MoELayer) -> float:
    """What to write as `router_aux_loss_coef`."""
    return next((loss.coefficient for loss in layer.losses if isinstance(loss, PerUnitBalance)), 0.0)


def one(values: Sequence[Any], what: str) -> Any:
    """The value that all layers share. Raises `UserError` where they do not."""
    for value in values[1:]:
        if value != values[0]:
            raise UserError(f"{what} differs between layers, which this family cannot express")
    return values[0]


def attention_of(block: Block) -> Attention:
    """The attention of a block. Raises `UserError` for another mixer."""
    if type(block.mixer) is not Attention:
        raise UserError(f"mixer: {type(block.mixer).__name__} has no place in this family; it needs Attention")
    return block.mixer


Blocks = tuple[Block, ...]


def decoder(fields: Fields, blocks: Blocks | Callable[[int], Blocks] | None = None, **parts: Any) -> Decoder:
    """A decoder from the fields that nearly all families share; parts: what else `Decoder` takes."""
    layers = num_layers(fields)
    if blocks is not None:
        parts["blocks"] = blocks if isinstance(blocks, tuple) else blocks(layers)
    norm = parts.pop("norm", None) or RMSNorm(eps=fields.take("rms_norm_eps", float, 1e-6))
    return Decoder(
        vocab_size=fields.take("vocab_size", int),
        dim=fields.take("hidden_size", int),
        num_layers=layers,
        norm=norm,
        tied=fields.take("tie_word_embeddings", bool, False),
        context=fields.take("max_position_embeddings", int),
        **parts,
    )


def write_common(config: Any) -> dict[str, Any]:
    """The fields of `decoder`, without those of its attention."""
    if not isinstance(config, Decoder):
        raise UserError(f"{type(config).__name__} is no Decoder, which this family needs")
    out: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.context,
    }
    if isinstance(config.norm, RMSNorm):
        out["rms_norm_eps"] = config.norm.eps
    return out


def write_decoder(config: Any) -> dict[str, Any]:
    """The fields of `decoder`, and those of attention heads where all layers have the same."""
    out = write_common(config)
    mixers = [attention_of(block) for block in config.resolved()]
    return out | {
        "num_attention_heads": one([m.num_heads for m in mixers], "num_heads"),
        "num_key_value_heads": one([m.num_kv_heads or m.num_heads for m in mixers], "num_kv_heads"),
        "head_dim": one([m.width(config.dim) for m in mixers], "head_dim"),
    }


def dense_of(block: Block) -> FeedForward:
    """The dense FFN of a block. Raises `UserError` for another."""
    if not isinstance(block.ffn, FeedForward):
        raise UserError(f"ffn: {type(block.ffn).__name__} has no place in this family; it needs a dense FeedForward")
    return block.ffn


def routed_of(block: Block) -> tuple[MoELayer, Router, Gated, TopK]:
    """The routed layer of a block with its router, bank and selection. Raises `UserError` for other parts."""
    layer = block.ffn
    if not isinstance(layer, MoELayer):
        raise UserError(f"ffn: {type(layer).__name__} has no place in this family; it needs MoELayer")
    if not isinstance(layer.router, Router) or not isinstance(layer.router.select, TopK):
        raise UserError("router: has no place in this family; it needs Router(select=TopK(...))")
    if type(layer.experts) is not Gated or not isinstance(layer.experts.width, int):
        raise UserError("experts: have no place in this family; it needs Gated experts of one width")
    return layer, layer.router, layer.experts, layer.router.select
