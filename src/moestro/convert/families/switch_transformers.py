"""Switch Transformer (Fedus et al. 2021, arXiv 2101.03961): T5 with sparse layers, an encoder-decoder."""

from __future__ import annotations

import math
from typing import Any

from ...core.errors import UserError
from ...experts.config import MLP
from ...losses.config import Loss, SequenceBalance, ZLoss
from ...models.config import Decoder, Encoder, EncoderDecoder, Stack
from ...moe.config import MoELayer
from ...nn.config import Attention, CrossAttention, PlainFeedForward, RelativeBias, RMSNorm
from ...routers.config import FixedCapacity, Jitter, Linear, Raw, Router, Score, TopK
from ..checkpoint.family import Family
from ..checkpoint.fields import Fields
from ..checkpoint.rules import Copy, Ignored, Rule, Table
from ..checkpoint.rules import Stack as Stacked
from .shared.parts import ACTIVATIONS, activation_field, num_layers, one

__all__ = ["FAMILY"]

_LENGTH = 512  # of the released models' training; relative positions know no limit


def _is_sparse(i: int, step: int) -> bool:
    """Whether transformers gives block i a sparse layer."""
    return step == 1 or (step > 1 and i % step == 1)


def _step(fields: Fields, side: str, layers: int) -> int:
    """Every how many blocks one is sparse. Without sparse layers transformers still makes one, its second."""
    wanted = fields.take(f"num_sparse_{side}_layers", int, 3)
    return fields.take(f"{side}_sparse_step", int, layers // wanted if wanted > 0 else layers)


def read(fields: Fields) -> EncoderDecoder:
    fields.only("tie_word_embeddings", True)
    fields.only("router_dtype", "float32")
    fields.only("is_gated_act", False)
    dim, inner = fields.take("d_model", int), fields.take("d_ff", int)
    heads, head_dim = fields.take("num_heads", int), fields.take("d_kv", int)
    activation = fields.choice("dense_act_fn", ACTIVATIONS, "relu")
    noise = fields.take("router_jitter_noise", float, 0.01)
    score: Score = Linear(bias=fields.take("router_bias", bool, False))
    losses: tuple[Loss, ...] = (
        SequenceBalance(coefficient=fields.take("router_aux_loss_coef", float, 0.001)),
        ZLoss(coefficient=fields.take("router_z_loss_coef", float, 0.001)),
    )
    moe = MoELayer(
        num_experts=fields.take("num_experts", int, 8),
        router=Router(
            score=Jitter(inner=score, noise=noise) if noise else score,
            select=TopK(k=1),
            weigh=Raw(),
            limit=FixedCapacity(size=fields.take("expert_capacity", int, 64)),
        ),
        experts=MLP(width=inner, activation=activation),
        losses=losses,
    )
    bias = RelativeBias(
        buckets=fields.take("relative_attention_num_buckets", int, 32),
        max_distance=fields.take("relative_attention_max_distance", int, 128),
    )
    attention = Attention(num_heads=heads, head_dim=head_dim, scale=1.0, positions=None)
    here = num_layers(fields, "num_layers")
    there = num_layers(fields, "num_decoder_layers") if fields.has("num_decoder_layers") else here

    def stack(side: str, layers: int) -> dict[str, Any]:
        step = _step(fields, side, layers)
        return {
            "vocab_size": fields.take("vocab_size", int),
            "dim": dim,
            "num_layers": layers,
            "relative_bias": bias,
            "ffn": PlainFeedForward(width=inner, activation=activation),
            "moe": moe,
            "layout": tuple("moe" if _is_sparse(i, step) else "dense" for i in range(layers)),
            "norm": RMSNorm(eps=fields.take("layer_norm_epsilon", float, 1e-6)),
            "context": fields.take("n_positions", int, _LENGTH),
        }

    return EncoderDecoder(
        encoder=Encoder(attention=attention.replace(causal=False), **stack("encoder", here)),
        decoder=Decoder(
            attention=attention,
            cross=CrossAttention(num_heads=heads, head_dim=head_dim, scale=1.0),
            tied=True,
            logits_scaling=math.sqrt(dim),
            **stack("decoder", there),
        ),
        start=fields.take("decoder_start_token_id", int, fields.take("pad_token_id", int, 0)),
    )


def _sparse_fields(side: str, stack: Stack) -> dict[str, int]:
    """The step that gives the layers of a stack, and the number of sparse layers that transformers derives it from."""
    kinds = [kind == "moe" for kind in stack.kinds()]
    for step in range(len(kinds) + 1):
        if [_is_sparse(i, step) for i in range(len(kinds))] == kinds:
            return {f"{side}_sparse_step": step, f"num_sparse_{side}_layers": len(kinds) // step if step else 0}
    raise UserError(f"{side}.layout: sparse blocks must come at equal distances, from the second block on")


def write(config: Any) -> dict[str, Any]:
    if not isinstance(config, EncoderDecoder):
        raise UserError(f"{type(config).__name__} is no EncoderDecoder, which this family needs")
    encoder, decoder = config.encoder, config.decoder
    blocks = [*encoder.resolved(), *decoder.resolved()]
    layers = [b.ffn for b in blocks if isinstance(b.ffn, MoELayer)]
    plain = [b.ffn for b in blocks if isinstance(b.ffn, PlainFeedForward)]
    mixers = [b.mixer for b in blocks if isinstance(b.mixer, Attention)]
    if len(layers) + len(plain) != len(blocks) or len(mixers) != len(blocks):
        raise UserError("blocks: this family needs Attention, and MoELayer or PlainFeedForward, in every block")
    bias, norm = encoder.relative_bias, encoder.norm
    if bias is None or not isinstance(norm, RMSNorm):
        raise UserError("encoder: this family needs a relative_bias, and RMSNorm")
    banks = [layer.experts for layer in layers]
    if not all(isinstance(bank, MLP) for bank in banks):
        raise UserError("experts: have no place in this family; it needs plain MLP experts")
    shape: Any = one([(m.width, m.activation) for m in (*plain, *banks)], "ffn and experts")  # type: ignore[attr-defined]
    out: dict[str, Any] = {
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
        "vocab_size": encoder.vocab_size,
        "d_model": encoder.dim,
        "d_ff": shape[0],
        "dense_act_fn": activation_field(shape[1]),
        "d_kv": one([m.width(encoder.dim) for m in mixers], "head_dim"),
        "num_heads": one([m.num_heads for m in mixers], "num_heads"),
        "num_layers": encoder.num_layers,
        "num_decoder_layers": decoder.num_layers,
        **_sparse_fields("encoder", encoder),
        **_sparse_fields("decoder", decoder),
        "relative_attention_num_buckets": bias.buckets,
        "relative_attention_max_distance": bias.max_distance,
        "layer_norm_epsilon": norm.eps,
        "n_positions": encoder.context,
        "decoder_start_token_id": config.start,
    }
    if layers:
        layer = one(layers, "moe")
        if not isinstance(layer.router, Router) or not isinstance(layer.router.limit, FixedCapacity):
            raise UserError("router: has no place in this family; it needs Router(limit=FixedCapacity(...))")
        score = layer.router.score
        linear = score.inner if isinstance(score, Jitter) else score
        if not isinstance(linear, Linear):
            raise UserError("router.score: has no place in this family; it needs Linear, with Jitter or without")
        out |= {
            "num_experts": layer.num_experts,
            "expert_capacity": layer.router.limit.size,
            "router_bias": linear.bias,
            "router_jitter_noise": score.noise if isinstance(score, Jitter) else 0.0,
            "router_aux_loss_coef": _coefficient(layer, SequenceBalance),
            "router_z_loss_coef": _coefficient(layer, ZLoss),
        }
    return out


def _coefficient(layer: MoELayer, kind: type[Loss]) -> float:
    return next((loss.coefficient for loss in layer.losses if isinstance(loss, kind)), 0.0)


def examples() -> dict[str, dict[str, Any]]:
    base = {
        "vocab_size": 41,
        "d_model": 16,
        "d_kv": 6,
        "d_ff": 20,
        "num_layers": 4,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 1,
        "num_heads": 2,
        "num_experts": 4,
        "expert_capacity": 64,
        "decoder_start_token_id": 0,
    }
    return {
        "plain": base,
        "full": base | {"expert_capacity": 2, "router_bias": True, "num_sparse_decoder_layers": 2, "num_layers": 3},
        "buckets": base
        | {
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 9,
            "dense_act_fn": "gelu",
            "router_jitter_noise": 0.0,
            "num_sparse_encoder_layers": 0,
            "decoder_start_token_id": 3,
        },
    }


def _side(side: str, ffn: int) -> list[Rule]:
    """One stack; ffn: the place of the feed-forward layer in a block."""
    ours, theirs = side + ".layers.{layer}.", side + ".block.{layer}.layer."
    mlp = f"{theirs}{ffn}.mlp."
    rules: list[Rule] = [
        Copy(f"{side}.relative.table", f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        Copy(f"{side}.norm.weight", f"{side}.final_layer_norm.weight"),
        Copy(f"{ours}mixer_norm.weight", f"{theirs}0.layer_norm.weight"),
        Copy(f"{ours}ffn_norm.weight", f"{theirs}{ffn}.layer_norm.weight"),
        Copy(f"{ours}ffn.up", f"{mlp}wi.weight"),
        Copy(f"{ours}ffn.down", f"{mlp}wo.weight"),
        Stacked(f"{ours}ffn.experts.up", f"{mlp}experts.expert_{{expert}}.wi.weight"),
        Stacked(f"{ours}ffn.experts.down", f"{mlp}experts.expert_{{expert}}.wo.weight"),
        Ignored(f"{side}.embed_tokens.weight", "both sides have one table", equals="shared.weight"),
    ]
    for score in ("score", "score.inner"):
        for part in ("weight", "bias"):
            rules.append(Copy(f"{ours}ffn.router.{score}.{part}", f"{mlp}router.classifier.{part}"))
    for name in "qkvo":
        rules.append(Copy(f"{ours}mixer.{name}.weight", f"{theirs}0.SelfAttention.{name}.weight"))
    return rules


_CROSS = "decoder.block.{layer}.layer.1."

TABLE: Table = (
    Copy("decoder.embed.weight", "shared.weight"),
    Ignored("lm_head.weight", "the head is tied to the embedding", equals="shared.weight"),
    *_side("encoder", 1),
    *_side("decoder", 2),
    Copy("decoder.layers.{layer}.cross_norm.weight", _CROSS + "layer_norm.weight"),
    *(
        Copy(f"decoder.layers.{{layer}}.cross.{name}.weight", f"{_CROSS}EncDecAttention.{name}.weight")
        for name in "qkvo"
    ),
)

FAMILY = Family(
    model_type="switch_transformers",
    architecture="SwitchTransformersForConditionalGeneration",
    table=TABLE,
    read=read,
    write=write,
    examples=examples,
)
