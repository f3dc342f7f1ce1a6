"""THOR (arXiv 2110.04260): fairseq's encoder-decoder with random experts in layers 0, 2, 4, ... of both sides.

fairseq writes pickles, which are never read here. Whoever trusts one writes its tensors, and its settings, anew:

    made = torch.load("checkpoint_best.pt", weights_only=False)  # runs what the file holds
    tensors = {name: t.float().contiguous().clone() for name, t in made["model"].items()}
    safetensors.torch.save_file(tensors, "model.safetensors")
    said = vars(made["args"] or made["cfg"]["model"])
    said = {k: v for k, v in said.items() if isinstance(v, (bool, int, float, str))}
    said |= {"model_type": "thor", "vocab_size": len(tensors["decoder.embed_tokens.weight"])}
    pathlib.Path("config.json").write_text(json.dumps(said))

Positions count from 2, behind fairseq's padding token 1; the decoder begins with its end token, 2.
"""

from __future__ import annotations

import math
from typing import Any

from ...core.errors import UserError
from ...experts.config import MLP
from ...models.config import Block, Decoder, Encoder, EncoderDecoder, Stack
from ...moe.config import MoELayer
from ...nn.config import Attention, CrossAttention, LayerNorm, PlainFeedForward, Sinusoidal
from ...routers.config import Constant, Random, Router, Uniform
from ..checkpoint.family import Family
from ..checkpoint.fields import Fields
from ..checkpoint.rules import Copy, Ignored, Rule, Table
from ..checkpoint.rules import Stack as Stacked
from ..families.shared.parts import num_layers, one

__all__ = ["FAMILY"]

_PAD = 1
_ACTIVATIONS: dict[str, Any] = {"relu": "relu", "gelu": "gelu", "gelu_fast": "gelu_tanh", "swish": "silu"}
_LEVELS: dict[int, Any] = {0: "token", 1: "sequence"}
_ABSENT = (
    "encoder_normalize_before",
    "decoder_normalize_before",
    "encoder_learned_pos",
    "decoder_learned_pos",
    "no_token_positional_embeddings",
    "layernorm_embedding",
    "no_cross_attention",
    "cross_self_attention",
    "adaptive_input",
)


def read(fields: Fields) -> EncoderDecoder:
    for name in _ABSENT:
        fields.only(name, False)
    if fields.has("adaptive_softmax_cutoff"):
        raise fields.error("adaptive_softmax_cutoff", "cannot be expressed here; leave it out")
    shared = fields.take("share_all_embeddings", bool, False)
    tied = fields.take("share_decoder_input_output_embed", bool, False) or shared
    vocabulary = fields.take("vocab_size", int)
    widths = {side: fields.take(f"{side}_embed_dim", int, 512) for side in ("encoder", "decoder")}
    for name in ("decoder_input_dim", "decoder_output_dim"):
        fields.only(name, widths["decoder"])
    activation = fields.choice("activation_fn", _ACTIVATIONS, "relu")
    select = Random(
        level="batch",
        evaluation=_LEVELS[fields.only("inference_level", *_LEVELS)],
        as_released=fields.take("inference_as_released", bool, False),
    )
    router = Router(score=Uniform(), select=select, weigh=Constant())
    num_experts, scaled = fields.take("num_experts", int, 2), not fields.take("no_scale_embedding", bool, False)

    def stack(side: str, context: str, size: int) -> dict[str, Any]:
        width, layers = fields.take(f"{side}_ffn_embed_dim", int, 2048), num_layers(fields, f"{side}_layers")
        experts = MLP(width=width, activation=activation, bias=True)
        return {
            "vocab_size": size,
            "dim": widths[side],
            "num_layers": layers,
            "attention": Attention(
                num_heads=fields.take(f"{side}_attention_heads", int, 8),
                bias="all",
                positions=None,
                causal=side == "decoder",
            ),
            "ffn": PlainFeedForward(width=width, activation=activation, bias=True),
            "moe": MoELayer(num_experts=num_experts, router=router, experts=experts, losses=()),
            "layout": tuple("dense" if i % 2 else "moe" for i in range(layers)),
            "norm": LayerNorm(),
            "norm_order": "post",
            "embedding_scale": math.sqrt(widths[side]) if scaled else None,
            "positions": Sinusoidal(endpoint=True, first=_PAD + 1),
            "context": fields.take(context, int, 1024),
            "dropout": fields.take("dropout", float, 0.1),
        }

    writer = stack("decoder", "max_target_positions", vocabulary)
    return EncoderDecoder(
        encoder=Encoder(**stack("encoder", "max_source_positions", fields.take("source_vocab_size", int, vocabulary))),
        decoder=Decoder(
            cross=CrossAttention(num_heads=writer["attention"].num_heads, bias="all"),
            source_dim=None if widths["encoder"] == widths["decoder"] else widths["encoder"],
            tied=tied,
            **writer,
        ),
        shared=shared,
        start=_PAD + 1,
    )


def write(config: Any) -> dict[str, Any]:
    """What a model says of itself; where it differs in anything else, that is found when this is read back."""
    if not isinstance(config, EncoderDecoder):
        raise UserError(f"{type(config).__name__} is no EncoderDecoder, which this layout needs")
    sides: dict[str, Stack] = {"encoder": config.encoder, "decoder": config.decoder}
    blocks = [block for stack in sides.values() for block in stack.resolved()]
    layers = [b.ffn for b in blocks if isinstance(b.ffn, MoELayer)]
    routers = [layer.router for layer in layers]
    if not layers or not all(isinstance(r, Router) and isinstance(r.select, Random) for r in routers):
        raise UserError("moe: this layout needs routed layers with Router(select=Random(...)) on both sides")
    select: Any = one([router.select for router in routers], "router")  # type: ignore[attr-defined]
    level = select.evaluation or select.level
    if level not in _LEVELS.values():
        raise UserError(f'router.select.evaluation: {level!r} has no place in this layout; set "token" or "sequence"')
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    found = one([getattr(_mlp(b), "activation", None) for b in blocks], "activation")
    out: dict[str, Any] = {
        "vocab_size": config.decoder.vocab_size,
        "source_vocab_size": config.encoder.vocab_size,
        "share_all_embeddings": config.shared,
        "share_decoder_input_output_embed": config.decoder.tied,
        "no_scale_embedding": config.encoder.embedding_scale is None,
        "activation_fn": names.get(found, found),
        "num_experts": one([layer.num_experts for layer in layers], "num_experts"),
        "inference_level": next(n for n, name in _LEVELS.items() if name == level),
        "inference_as_released": select.as_released,
        "dropout": config.decoder.dropout,
        "max_source_positions": config.encoder.context,
        "max_target_positions": config.decoder.context,
    }
    for side, stack in sides.items():
        mine = stack.resolved()
        out |= {
            f"{side}_embed_dim": stack.dim,
            f"{side}_layers": stack.num_layers,
            f"{side}_attention_heads": one([getattr(b.mixer, "num_heads", None) for b in mine], "num_heads"),
            f"{side}_ffn_embed_dim": one([getattr(_mlp(b), "width", None) for b in mine], "width"),
        }
    return out


def _mlp(block: Block) -> Any:
    """What says width and activation of a block's feed-forward layer."""
    return block.ffn.experts if isinstance(block.ffn, MoELayer) else block.ffn


def examples() -> dict[str, dict[str, Any]]:
    base = {"vocab_size": 19, "num_experts": 2, "inference_level": 1, "share_all_embeddings": True}
    for side in ("encoder", "decoder"):
        sizes = {"embed_dim": 8, "ffn_embed_dim": 12, "attention_heads": 2, "layers": 3}
        base |= {f"{side}_{name}": size for name, size in sizes.items()}
    apart = {"share_all_embeddings": False, "source_vocab_size": 23, "decoder_layers": 1, "activation_fn": "gelu"}
    return {
        "plain": base,
        "apart": base | apart | {"encoder_embed_dim": 10, "num_experts": 3, "inference_level": 0},
        "tied": base | {"share_all_embeddings": False, "share_decoder_input_output_embed": True},
    }


def _side(side: str) -> list[Rule]:
    at = side + ".layers.{layer}."
    rules: list[Rule] = [
        Copy(f"{side}.embed.weight", f"{side}.embed_tokens.weight"),
        Ignored(f"{side}.version", "the version of fairseq's code"),
        Ignored(f"{side}.embed_positions._float_tensor", "it only tells fairseq the dtype of positions"),
    ]
    attentions = {"mixer": "self_attn"} | ({"cross": "encoder_attn"} if side == "decoder" else {})
    for kind in ("weight", "bias"):
        for ours, theirs in attentions.items():
            rules += [Copy(f"{at}{ours}.{n}.{kind}", f"{at}{theirs}.{n}_proj.{kind}") for n in "qkv"]
            rules.append(Copy(f"{at}{ours}.o.{kind}", f"{at}{theirs}.out_proj.{kind}"))
            rules.append(Copy(f"{at}{ours}_norm.{kind}", f"{at}{theirs}_layer_norm.{kind}"))
        rules.append(Copy(f"{at}ffn_norm.{kind}", f"{at}final_layer_norm.{kind}"))
    for ours, theirs in (("up", "fc1"), ("down", "fc2")):
        for suffix, kind in (("", "weight"), ("_bias", "bias")):
            rules.append(Copy(f"{at}ffn.{ours}{suffix}", f"{at}{theirs}.{kind}"))
            rules.append(Stacked(f"{at}ffn.experts.{ours}{suffix}", f"{at}{theirs}.{{expert}}.{kind}"))
    return rules


_TABLE = "decoder.embed_tokens.weight"

TABLE: Table = (
    *_side("encoder"),
    *_side("decoder"),
    Copy("decoder.head.weight", "decoder.output_projection.weight"),
    Ignored("encoder.embed_tokens.weight", "both sides have one table", equals=_TABLE, written=True),
    Ignored("decoder.output_projection.weight", "the head is tied to the embedding", equals=_TABLE, written=True),
)

FAMILY = Family(
    model_type="thor",
    architecture="ThorTransformerModel",
    table=TABLE,
    read=read,
    write=write,
    examples=examples,
)
