"""Mixtral (Jiang et al. 2024, arXiv 2401.04088)."""

from __future__ import annotations

from typing import Any

from ...experts.config import Gated
from ...models.config import Decoder
from ...moe.config import MoELayer
from ...nn.config import Attention, RMSNorm
from ..checkpoint.family import Family
from ..checkpoint.fields import Fields
from .shared.layouts import ATTENTION, EDGES, NORMS, experts
from .shared.parts import (
    ACTIVATIONS,
    activation_field,
    attention_of,
    balance,
    balance_coefficient,
    decoder,
    heads,
    one,
    routed_of,
    router,
    write_decoder,
)
from .shared.rope import read_rotary, write_rotary

__all__ = ["FAMILY"]


def read(fields: Fields) -> Decoder:
    return decoder(
        fields,
        attention=Attention(
            **heads(fields, kv=8),
            window=fields.take("sliding_window", int, None),
            positions=read_rotary(fields, default_theta=1e6),
        ),
        moe=MoELayer(
            num_experts=fields.take("num_local_experts", int, 8, also=("num_experts",)),
            router=router(fields.take("num_experts_per_tok", int, 2), True),
            experts=Gated(
                width=fields.take("intermediate_size", int, 14_336),
                activation=fields.choice("hidden_act", ACTIVATIONS, "silu"),
            ),
            losses=balance(fields),
        ),
        norm=RMSNorm(eps=fields.take("rms_norm_eps", float, 1e-5)),
    )


def write(config: Decoder) -> dict[str, Any]:
    fields = write_decoder(config)
    blocks = config.resolved()
    attention = attention_of(blocks[0])
    layer, _, bank, select = routed_of(blocks[0])
    return {
        **fields,
        **write_rotary(attention.positions),
        "sliding_window": one([attention_of(block).window for block in blocks], "window"),
        "num_local_experts": layer.num_experts,
        "num_experts_per_tok": select.k,
        "intermediate_size": bank.width,
        "hidden_act": activation_field(bank.activation),
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
        "num_local_experts": 4,
        "max_position_embeddings": 64,
    }
    return {
        "plain": base,
        "window": {**base, "sliding_window": 5, "head_dim": 8, "rms_norm_eps": 1e-6, "router_aux_loss_coef": 0.02},
    }


FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    table=(*EDGES, *NORMS, *ATTENTION, *experts("block_sparse_moe", gate="w1", up="w3", down="w2")),
    read=read,
    write=write,
    examples=examples,
)
