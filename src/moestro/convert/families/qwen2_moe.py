"""Qwen1.5-MoE and Qwen2-MoE: a shared expert behind a sigmoid gate (Yang et al. 2024, arXiv 2407.10671)."""

from __future__ import annotations

from typing import Any

from ...core.errors import UserError
from ...experts.config import Gated
from ...models.config import Block, Decoder
from ...moe.config import GateMerge, MoELayer
from ...nn.config import Attention, FeedForward, RMSNorm
from ..checkpoint.family import Family
from ..checkpoint.fields import Fields
from .shared.layouts import ATTENTION, DENSE, EDGES, NORMS, experts, shared_expert
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
    routed_of,
    router,
    write_decoder,
)
from .shared.qwen import sparse_layers, windows, write_sparse_layers, write_windows
from .shared.rope import read_rotary, write_rotary

__all__ = ["FAMILY"]


def read(fields: Fields) -> Decoder:
    norm = RMSNorm(eps=fields.take("rms_norm_eps", float, 1e-6))
    layers = num_layers(fields)
    windowed = fields.take("max_window_layers", int, 28)
    attention = Attention(
        **heads(fields, kv=16),
        bias="qkv" if fields.take("qkv_bias", bool, True) else "none",
        positions=read_rotary(fields),
    )
    activation = fields.choice("hidden_act", ACTIVATIONS, "silu")
    dense = FeedForward(width=fields.take("intermediate_size", int, 5632), activation=activation)
    moe = MoELayer(
        num_experts=fields.take("num_experts", int, 60, also=("num_local_experts",)),
        router=router(fields.take("num_experts_per_tok", int, 4), fields.take("norm_topk_prob", bool, False)),
        experts=Gated(width=fields.take("moe_intermediate_size", int, 1408), activation=activation),
        shared=Gated(width=fields.take("shared_expert_intermediate_size", int, 5632), activation=activation),
        merge=GateMerge(),
        losses=balance(fields),
    )
    each = windows(fields, layers, lambda i: i % 2 == 0 and i < windowed)
    blocks = tuple(
        Block(mixer=attention.replace(window=window), ffn=moe if routed else dense, norm=norm)
        for window, routed in zip(each, sparse_layers(fields, layers))
    )
    return decoder(fields, blocks=blocks, norm=norm)


def write(config: Decoder) -> dict[str, Any]:
    fields = write_decoder(config)
    blocks = config.resolved()
    attention = attention_of(blocks[0])
    layer, chosen, bank, select = routed_of(first_of(blocks, MoELayer))
    if not isinstance(layer.shared, Gated):
        raise UserError("shared: this family needs a gated shared expert with a GateMerge")
    if attention.width(config.dim) * attention.num_heads == config.dim:
        del fields["head_dim"]  # this family has no such field
    dense = [block.ffn.width for block in blocks if isinstance(block.ffn, FeedForward)]
    return {
        **fields,
        **write_rotary(attention.positions),
        **write_sparse_layers(blocks),
        **write_windows(blocks),
        **({"intermediate_size": dense[0]} if dense else {}),
        "qkv_bias": attention.bias == "qkv",
        "num_experts": layer.num_experts,
        "num_experts_per_tok": select.k,
        "norm_topk_prob": normalised(chosen),
        "moe_intermediate_size": bank.width,
        "shared_expert_intermediate_size": layer.shared.width,
        "hidden_act": activation_field(bank.activation),
        "router_aux_loss_coef": balance_coefficient(layer),
    }


def examples() -> dict[str, dict[str, Any]]:
    base = {
        "vocab_size": 41,
        "hidden_size": 24,
        "intermediate_size": 20,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 28,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "max_position_embeddings": 64,
    }
    windowed = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3}
    mixed = {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], "norm_topk_prob": True}
    return {"plain": base, "mixed": {**base, **mixed, **windowed, "qkv_bias": False}}


FAMILY = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    table=(
        *EDGES,
        *NORMS,
        *ATTENTION,
        *DENSE,
        *experts(),
        *shared_expert("mlp.shared_expert", "mlp.shared_expert_gate"),
    ),
    read=read,
    write=write,
    examples=examples,
)
