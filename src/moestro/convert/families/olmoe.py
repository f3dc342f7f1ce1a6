"""OLMoE (Muennighoff et al. 2024, arXiv 2409.02060)."""

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
    normalised,
    routed_of,
    router,
    write_decoder,
)
from .shared.rope import read_rotary, write_rotary

__all__ = ["FAMILY"]


def read(fields: Fields) -> Decoder:
    fields.only("clip_qkv", None)
    fields.only("sliding_window", None)
    eps = fields.take("rms_norm_eps", float, 1e-5)
    parts = heads(fields)
    if parts.pop("head_dim") not in (None, fields.take("hidden_size", int) // parts["num_heads"]):
        raise fields.error("head_dim", "must be hidden_size / num_attention_heads in this family")
    bias = fields.take("attention_bias", bool, False)
    return decoder(
        fields,
        attention=Attention(
            **parts,
            qk_norm="full",
            norm_eps=eps,
            bias="all" if bias else "none",
            positions=read_rotary(fields),
        ),
        moe=MoELayer(
            num_experts=fields.take("num_experts", int, 64, also=("num_local_experts",)),
            router=router(fields.take("num_experts_per_tok", int, 8), fields.take("norm_topk_prob", bool, False)),
            experts=Gated(
                width=fields.take("intermediate_size", int, 2048),
                activation=fields.choice("hidden_act", ACTIVATIONS, "silu"),
            ),
            losses=balance(fields, 0.01),
        ),
        norm=RMSNorm(eps=eps),
    )


def write(config: Decoder) -> dict[str, Any]:
    fields = write_decoder(config)
    block = config.resolved()[0]
    attention = attention_of(block)
    layer, chosen, bank, select = routed_of(block)
    if attention.width(config.dim) * attention.num_heads == config.dim:
        del fields["head_dim"]  # this family has no such field
    return {
        **fields,
        **write_rotary(attention.positions),
        "attention_bias": attention.bias == "all",
        "clip_qkv": None,
        "num_experts": layer.num_experts,
        "num_experts_per_tok": select.k,
        "norm_topk_prob": normalised(chosen),
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
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "max_position_embeddings": 64,
        "eos_token_id": 0,
    }
    return {
        "plain": base,
        "grouped": {**base, "num_key_value_heads": 2, "norm_topk_prob": True, "tie_word_embeddings": True},
    }


FAMILY = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    table=(*EDGES, *NORMS, *ATTENTION, *experts()),
    read=read,
    write=write,
    examples=examples,
)
