"""Phi-3.5-MoE (Abdin et al. 2024, arXiv 2404.14219; routing: arXiv 2409.12136): SparseMixer, layer norms, head bias.

`input_jitter_noise`, training noise on what routers and experts see, is kept in config.json and not applied here.
"""

from __future__ import annotations

from typing import Any

from ...core.errors import UserError
from ...experts.config import Gated
from ...models.config import Decoder
from ...moe.config import MoELayer
from ...nn.config import Attention, LayerNorm
from ...routers.config import NearBest, Router, SparseMixer
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
    write_decoder,
)
from .shared.rope import read_rotary, write_rotary

__all__ = ["FAMILY"]


def read(fields: Fields) -> Decoder:
    fields.only("num_experts_per_tok", 2)  # the released code takes two, whatever this says
    epsilon = fields.take("router_jitter_noise", float, 0.01)
    return decoder(
        fields,
        attention=Attention(
            **heads(fields, kv=8),
            bias="all" if fields.take("attention_bias", bool, False) else "none",
            window=fields.take("sliding_window", int, None),
            positions=read_rotary(fields, default_theta=1e6),
        ),
        moe=MoELayer(
            num_experts=fields.take("num_local_experts", int, 16, also=("num_experts",)),
            router=Router(select=SparseMixer(k=2, epsilon=epsilon), weigh=NearBest(epsilon=epsilon)),
            experts=Gated(
                width=fields.take("intermediate_size", int, 6400),
                activation=fields.choice("hidden_act", ACTIVATIONS, "silu"),
            ),
            losses=balance(fields),
        ),
        norm=LayerNorm(eps=fields.take("rms_norm_eps", float, 1e-5)),
        head_bias=fields.take("lm_head_bias", bool, False),
    )


def write(config: Decoder) -> dict[str, Any]:
    fields = write_decoder(config)
    blocks = config.resolved()
    attention = one([attention_of(block) for block in blocks], "attention")
    layer = one([block.ffn for block in blocks], "ffn")
    if not isinstance(layer, MoELayer) or type(layer.experts) is not Gated:
        raise UserError("ffn: has no place in this family; it needs MoELayer with Gated experts")
    if not isinstance(layer.router, Router) or not isinstance(layer.router.select, SparseMixer):
        raise UserError("router: has no place in this family; it needs Router(select=SparseMixer(...))")
    if not isinstance(config.norm, LayerNorm):
        raise UserError(f"norm: {type(config.norm).__name__} has no place in this family; it needs LayerNorm")
    if attention.width(config.dim) * attention.num_heads == config.dim:
        del fields["head_dim"]  # this family has no such field
    return {
        **fields,
        **write_rotary(attention.positions),
        "attention_bias": attention.bias == "all",
        "sliding_window": attention.window,
        "num_local_experts": layer.num_experts,
        "num_experts_per_tok": layer.router.select.k,
        "router_jitter_noise": layer.router.select.epsilon,
        "intermediate_size": layer.experts.width,
        "hidden_act": activation_field(layer.experts.activation),
        "router_aux_loss_coef": balance_coefficient(layer),
        "rms_norm_eps": config.norm.eps,
        "lm_head_bias": config.head_bias,
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
        "max_position_embeddings": 64,
    }
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0, 1.5, 2.0],
        "long_factor": [1.0, 3.0, 5.0],
        "short_mscale": 1.2,
        "long_mscale": 1.3,
        "original_max_position_embeddings": 48,
    }
    other = {"lm_head_bias": True, "attention_bias": True, "router_jitter_noise": 0.4, "sliding_window": 5}
    return {
        "plain": base,
        "longrope": base | other | {"rope_parameters": rope},
        "tied": base | {"tie_word_embeddings": True, "router_jitter_noise": 0.2, "rms_norm_eps": 1e-4},
    }


FAMILY = Family(
    model_type="phimoe",
    architecture="PhimoeForCausalLM",
    table=(*EDGES, *NORMS, *ATTENTION, *experts("block_sparse_moe", gate="w1", up="w3", down="w2")),
    read=read,
    write=write,
    examples=examples,
)
