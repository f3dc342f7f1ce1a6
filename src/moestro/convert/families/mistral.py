"""Mistral 7B and its successors of the same shape (Jiang et al. 2023, arXiv 2310.06825)."""

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
    # absent, a window of 4096 is meant; null means none
    window = fields.take("sliding_window", int, None if "sliding_window" in fields.data else 4096)
    return decoder(
        fields,
        attention=Attention(**heads(fields, kv=8), window=window, positions=read_rotary(fields)),
        ffn=FeedForward(
            width=fields.take("intermediate_size", int, 14_336),
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
        "sliding_window": attention.window,
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
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return {"window": {**base, "sliding_window": 5}, "plain": {**base, "sliding_window": None, "head_dim": 8}}


FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    table=(*EDGES, *NORMS, *ATTENTION, *DENSE),
    read=read,
    write=write,
    examples=examples,
)
