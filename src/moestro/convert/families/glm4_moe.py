"""GLM-4.5 (Z.ai 2025, arXiv 2508.06471): grouped-query attention with DeepSeek-V3's routed layers."""

from __future__ import annotations

from typing import Any

from ...models.config import Decoder
from ...nn.config import Attention, RMSNorm
from ..checkpoint.family import Family
from ..checkpoint.fields import Fields
from ..checkpoint.rules import Ignored
from .shared.layouts import ATTENTION, EDGES, NORMS
from .shared.mixed import (
    biased_router,
    first_dense,
    leading,
    routed_layer,
    routed_table,
    split_layers,
    write_biased_router,
    write_first_dense,
    write_routed,
)
from .shared.parts import attention_of, decoder, heads, one, write_decoder
from .shared.rope import read_rotary, write_rotary

__all__ = ["FAMILY"]

_MTP = "predicts the token after the next; transformers leaves it out as well"


def read(fields: Fields) -> Decoder:
    if not fields.has("partial_rotary_factor"):
        fields.data["partial_rotary_factor"] = 0.5  # this family's default
    eps = fields.take("rms_norm_eps", float, 1e-5)
    router = biased_router(fields, k=8, groups=1, kept=1, scale=1.0)
    return decoder(
        fields,
        attention=Attention(
            **heads(fields, kv=8),
            qk_norm="head" if fields.take("use_qk_norm", bool, False) else None,
            norm_eps=eps,
            bias="qkv" if fields.take("attention_bias", bool, False) else "none",
            positions=read_rotary(fields),
        ),
        ffn=leading(fields),
        moe=routed_layer(fields, router, defaults=(128, 1, 1408)),
        layout=first_dense(fields, 1),
        norm=RMSNorm(eps=eps),
    )


def write(config: Decoder) -> dict[str, Any]:
    dense, routed = split_layers(config)
    attention = one([attention_of(block) for block in config.resolved()], "attention")
    positions = write_rotary(attention.positions)
    positions["rope_parameters"]["partial_rotary_factor"] = attention.positions.fraction  # 1 is not the default here
    return {
        **write_decoder(config),
        **positions,
        "use_qk_norm": attention.qk_norm == "head",
        "attention_bias": attention.bias == "qkv",
        "num_nextn_predict_layers": 0,
        **write_first_dense(config),
        **write_routed(routed, dense),
        **write_biased_router(routed),
    }


def examples() -> dict[str, dict[str, Any]]:
    base = {
        "vocab_size": 41,
        "hidden_size": 24,
        "intermediate_size": 28,
        "moe_intermediate_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "max_position_embeddings": 64,
        "num_nextn_predict_layers": 0,
    }
    groups = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "n_shared_experts": 2}
    return {
        "plain": {**base, "attention_bias": True},
        "groups": {**base, **groups, "use_qk_norm": True, "first_k_dense_replace": 0},
        "whole": {**base, "partial_rotary_factor": 1.0, "norm_topk_prob": False, "tie_word_embeddings": True},
    }


FAMILY = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    table=(
        *EDGES,
        *NORMS,
        *ATTENTION,
        *routed_table(),
        Ignored("model.layers.46.{name}", _MTP),
        Ignored("model.layers.92.{name}", _MTP),
    ),
    read=read,
    write=write,
    examples=examples,
)
