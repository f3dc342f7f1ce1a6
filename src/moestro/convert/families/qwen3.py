"""Qwen3, dense (Yang et al. 2025, arXiv 2505.09388)."""

from __future__ import annotations

from typing import Any

from ...models.config import Block, Decoder
from ...nn.config import Attention, FeedForward, RMSNorm
from ..checkpoint.family import Family
from ..checkpoint.fields import Fields
from .shared.layouts import ATTENTION, DENSE, EDGES, NORMS
from .shared.parts import (
    ACTIVATIONS,
    activation_field,
    attention_of,
    decoder,
    dense_of,
    heads,
    num_layers,
    write_decoder,
)
from .shared.qwen import windows, write_windows
from .shared.rope import read_rotary, write_rotary

__all__ = ["FAMILY"]


def read(fields: Fields) -> Decoder:
    norm = RMSNorm(eps=fields.take("rms_norm_eps", float, 1e-6))
    full_below = fields.take("max_window_layers", int, 28)
    attention = Attention(
        **heads(fields, kv=32, head_dim=128),
        qk_norm="head",
        norm_eps=norm.eps,
        bias="all" if fields.take("attention_bias", bool, False) else "none",
        positions=read_rotary(fields),
    )
    ffn = FeedForward(
        width=fields.take("intermediate_size", int, 22_016),
        activation=fields.choice("hidden_act", ACTIVATIONS, "silu"),
    )
    each = windows(fields, num_layers(fields), lambda i: i >= full_below)
    blocks = tuple(Block(mixer=attention.replace(window=w), ffn=ffn, norm=norm) for w in each)
    return decoder(fields, blocks=blocks, norm=norm)


def write(config: Decoder) -> dict[str, Any]:
    fields = write_decoder(config)
    blocks = config.resolved()
    ffn, attention = dense_of(blocks[0]), attention_of(blocks[0])
    return {
        **fields,
        **write_rotary(attention.positions),
        **write_windows(blocks),
        "attention_bias": attention.bias == "all",
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
        "head_dim": 8,
        "max_position_embeddings": 64,
    }
    windowed = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    return {"tied": {**base, "tie_word_embeddings": True}, "windows": {**base, **windowed, "attention_bias": True}}


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    table=(*EDGES, *NORMS, *ATTENTION, *DENSE),
    read=read,
    write=write,
    examples=examples,
)
