"""Llama 2 and 3 (Touvron et al. 2023, arXiv 2307.09288; Grattafiori et al. 2024, arXiv 2407.21783)."""

from __future__ import annotations

from typing import Any

from ...models.config import Decoder
from ...nn.config import Attention, FeedForward, RMSNorm
from ..checkpoint.family import Family
from ..checkpoint.fields import Fields
from .shared.layouts import ATTENTION, DENSE, EDGES, NORMS
from .shared.parts import ACTIVATIONS, activation_field, attention_of, decoder, dense_of, heads, write_decoder
from .shared.rope import read_rotary, write_rotary

__all__ = ["FAMILY"]


def read(fields: Fields) -> Decoder:
    fields.only("mlp_bias", False)
    bias = fields.take("attention_bias", bool, False)
    return decoder(
        fields,
        attention=Attention(**heads(fields), bias="all" if bias else "none", positions=read_rotary(fields)),
        ffn=FeedForward(
            width=fields.take("intermediate_size", int),
            activation=fields.choice("hidden_act", ACTIVATIONS, "silu"),
        ),
        norm=RMSNorm(eps=fields.take("rms_norm_eps", float, 1e-6)),
    )


def write(config: Decoder) -> dict[str, Any]:
    fields = write_decoder(config)
    block = config.resolved()[0]
    ffn, attention = dense_of(block), attention_of(block)
    return {
        **fields,
        **write_rotary(attention.positions),
        "attention_bias": attention.bias == "all",
        "mlp_bias": False,
        "intermediate_size": ffn.width,
        "hidden_act": activation_field(ffn.activation),
    }


def examples() -> dict[str, dict[str, Any]]:
    base = {
        "vocab_size": 41,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    stretched = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return {
        "plain": {**base, "hidden_act": "gelu_pytorch_tanh"},
        "llama3": {
            **base,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_parameters": stretched,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-5,
        },
        "linear": {**base, "attention_bias": True, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    }


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    table=(*EDGES, *NORMS, *ATTENTION, *DENSE),
    read=read,
    write=write,
    examples=examples,
)
