"""Granite 3.0 MoE (IBM 2024): four multipliers, fused expert matrices, weights from the logits of the chosen."""

from __future__ import annotations

from typing import Any

from ...core.errors import UserError
from ...experts.config import Gated
from ...models.config import Decoder
from ...moe.config import MoELayer
from ...nn.config import Attention, RMSNorm
from ...routers.config import Router, SoftmaxKept, TopK
from ..checkpoint.family import Family
from ..checkpoint.fields import Fields
from ..checkpoint.rules import Copy, Table
from .shared.layouts import ATTENTION, EDGES, NORMS
from .shared.parts import (
    ACTIVATIONS,
    activation_field,
    attention_of,
    balance,
    balance_coefficient,
    decoder,
    heads,
    one,
    write_decoder,
)
from .shared.rope import read_rotary, write_rotary

__all__ = ["FAMILY", "TABLE", "read", "write"]


def read(fields: Fields) -> Decoder:
    embedding = fields.take("embedding_multiplier", float, 1.0)
    return decoder(
        fields,
        attention=Attention(
            **heads(fields),
            bias="all" if fields.take("attention_bias", bool, False) else "none",
            scale=fields.take("attention_multiplier", float, 1.0),
            positions=read_rotary(fields),
        ),
        moe=MoELayer(
            num_experts=fields.take("num_local_experts", int, 8, also=("num_experts",)),
            router=Router(select=TopK(k=fields.take("num_experts_per_tok", int, 2)), weigh=SoftmaxKept()),
            experts=Gated(
                width=fields.take("intermediate_size", int, 11_008),
                activation=fields.choice("hidden_act", ACTIVATIONS, "silu"),
            ),
            losses=balance(fields),
        ),
        norm=RMSNorm(eps=fields.take("rms_norm_eps", float, 1e-6)),
        embedding_scale=None if embedding == 1.0 else embedding,
        residual_scale=fields.take("residual_multiplier", float, 1.0),
        logits_scaling=fields.take("logits_scaling", float, 1.0),
    )


def write(config: Decoder) -> dict[str, Any]:
    fields = write_decoder(config)
    blocks = config.resolved()
    attention = one([attention_of(block) for block in blocks], "attention")
    layer = one([block.ffn for block in blocks], "ffn")
    if not isinstance(layer, MoELayer) or type(layer.experts) is not Gated:
        raise UserError("ffn: has no place in this family; it needs MoELayer with Gated experts")
    if not isinstance(layer.router, Router) or not isinstance(layer.router.select, TopK):
        raise UserError("router: has no place in this family; it needs Router(select=TopK(...))")
    if attention.width(config.dim) * attention.num_heads == config.dim:
        del fields["head_dim"]  # this family has no such field
    return {
        **fields,
        **write_rotary(attention.positions),
        "attention_bias": attention.bias == "all",
        "attention_multiplier": attention.width(config.dim) ** -0.5 if attention.scale is None else attention.scale,
        "embedding_multiplier": 1.0 if config.embedding_scale is None else config.embedding_scale,
        "residual_multiplier": one([block.residual_scale for block in blocks], "residual_scale"),
        "logits_scaling": config.logits_scaling,
        "num_local_experts": layer.num_experts,
        "num_experts_per_tok": layer.router.select.k,
        "intermediate_size": layer.experts.width,
        "hidden_act": activation_field(layer.experts.activation),
        "router_aux_loss_coef": balance_coefficient(layer),
    }


def examples() -> dict[str, dict[str, Any]]:
    base = {
        "vocab_size": 41,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
    }
    multipliers = {
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.22,
        "logits_scaling": 6.0,
    }
    other = {"attention_bias": True, "tie_word_embeddings": True, "hidden_act": "gelu", "num_experts_per_tok": 3}
    return {"plain": base, "multipliers": base | multipliers, "other": base | multipliers | other}


_OURS, _THEIRS = "layers.{layer}.ffn.", "model.layers.{layer}.block_sparse_moe."

TABLE: Table = (
    *EDGES,
    *NORMS,
    *ATTENTION,
    Copy(_OURS + "router.score.weight", _THEIRS + "router.layer.weight"),
    Copy(_OURS + "experts.gate_up", _THEIRS + "input_linear.weight"),
    Copy(_OURS + "experts.down", _THEIRS + "output_linear.weight"),
)

FAMILY = Family(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    table=TABLE,
    read=read,
    write=write,
    examples=examples,
)
