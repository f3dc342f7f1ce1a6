"""Qwen3, sparse (Yang et al. 2025, arXiv 2505.09388)."""

from __future__ import annotations

from typing import Any

from ...experts.config import Gated
from ...models.config import Block, Decoder
from ...moe.config import MoELayer
from ...nn.config import Attention, FeedForward, RMSNorm
from ..checkpoint.family import Family
from ..checkpoint.fields import Fields
from .shared.layouts import ATTENTION, DENSE, EDGES, NORMS, experts
from .shared.parts import (
    ACTIVATIONS,
    activation_field,
    attention_of,
    balance,
    balance_coefficient,
    decoder,
    first_of,
    heads,
    normalised,
    num_layers,
    one,
    routed_of,
    router,
    write_decoder,
)
from .shared.qwen import sparse_layers, write_sparse_layers
from .shared.rope import read_rotary, write_rotary

__all__ = ["FAMILY"]


def read(fields: Fields) -> Decoder:
    norm = RMSNorm(eps=fields.take("rms_norm_eps", float, 1e-6))
    window = fields.take("sliding_window", int, 4096)
    attention = Attention(
        **heads(fields, kv=4),
        qk_norm="head",
        norm_eps=norm.eps,
        bias="all" if fields.take("attention_bias", bool, False) else "none",
        window=window if fields.take("use_sliding_window", bool, False) else None,
        positions=read_rotary(fields),
    )
    activation = fields.choice("hidden_act", ACTIVATIONS, "silu")
    dense = FeedForward(width=fields.take("intermediate_size", int, 6144), activation=activation)
    moe = MoELayer(
        num_experts=fields.take("num_experts", int, 128, also=("num_local_experts",)),
        router=router(fields.take("num_experts_per_tok", int, 8), fields.take("norm_topk_prob", bool, False)),
        experts=Gated(width=fields.take("moe_intermediate_size", int, 768), activation=activation),
        losses=balance(fields),
    )
    sparse = sparse_layers(fields, num_layers(fields))
    blocks = tuple(Block(mixer=attention, ffn=moe if routed else dense, norm=norm) for routed in sparse)
    return decoder(fields, blocks=blocks, norm=norm)


def write(config: Decoder) -> dict[str, Any]:
    fields = write_decoder(config)
    blocks = config.resolved()
    attention = attention_of(blocks[0])
    layer, chosen, bank, select = routed_of(first_of(blocks, MoELayer))
    window = one([attention_of(block).window for block in blocks], "window")
    dense = [block.ffn.width for block in blocks if isinstance(block.ffn, FeedForward)]
    return {
        **fields,
        **write_rotary(attention.positions),
        **write_sparse_layers(blocks),
        **({"intermediate_size": dense[0]} if dense else {}),
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "attention_bias": attention.bias == "all",
        "num_experts": layer.num_experts,
        "num_experts_per_tok": select.k,
        "norm_topk_prob": normalised(chosen),
        "moe_intermediate_size": bank.width,
        "hidden_act": activation_field(bank.activation),
        "router_aux_loss_coef": balance_coefficient(layer),
    }


def examples() -> dict[str, dict[str, Any]]:
    base = {
        "vocab_size": 41,
        "hidden_size": 24,
        "intermediate_size": 20,
        "moe_intermediate_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "max_position_embeddings": 64,
    }
    stretched = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    return {
        "normalised": {**base, "num_hidden_layers": 2, "norm_topk_prob": True, "rope_parameters": stretched},
        "mixed": {**base, "mlp_only_layers": [0], "use_sliding_window": True, "sliding_window": 5},
    }


FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    table=(*EDGES, *NORMS, *ATTENTION, *DENSE, *experts()),
    read=read,
    write=write,
    examples=examples,
)
