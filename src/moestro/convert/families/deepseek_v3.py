"""DeepSeek-V3 (DeepSeek-AI 2024, arXiv 2412.19437) and what has its layout (R1, Moonlight)."""

from __future__ import annotations

from typing import Any

from ...models.config import Decoder
from ..checkpoint.family import Family
from ..checkpoint.fields import Fields
from ..checkpoint.rules import Ignored
from .shared.latent import LATENT, read_latent, write_latent
from .shared.layouts import EDGES, NORMS
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
from .shared.parts import decoder, write_common

__all__ = ["FAMILY"]


def read(fields: Fields) -> Decoder:
    router = biased_router(fields, k=8, groups=8, kept=4, scale=2.5)
    interleaved = fields.take("rope_interleave", bool, True)
    return decoder(
        fields,
        attention=read_latent(fields, "interleaved" if interleaved else "half"),
        ffn=leading(fields),
        moe=routed_layer(fields, router, defaults=(256, 1, 2048)),
        layout=first_dense(fields, 3),
    )


def write(config: Decoder) -> dict[str, Any]:
    dense, routed = split_layers(config)
    return {
        **write_common(config),
        **write_latent(config, any_style=True),
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
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "q_lora_rank": 12,
        "kv_lora_rank": 10,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 7,
        "max_position_embeddings": 64,
        "num_nextn_predict_layers": 0,
    }
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0}
    moonlight = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446, "first_k_dense_replace": 0}
    return {
        "plain": base,
        "yarn": {**base, "rope_parameters": {**yarn, "mscale": 1.0, "mscale_all_dim": 1.0, "rope_theta": 10000.0}},
        "mscales": {**base, "rope_parameters": {**yarn, "mscale": 0.7, "mscale_all_dim": 1.3, "rope_theta": 1000.0}},
        "moonlight": {**base, **moonlight, "q_lora_rank": None, "n_shared_experts": 1, "rms_norm_eps": 1e-5},
        "biases": {**base, "attention_bias": True, "rope_interleave": False, "tie_word_embeddings": True},
        "raw": {**base, "norm_topk_prob": False, "qk_nope_head_dim": 3, "v_head_dim": 12},
    }


FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    table=(
        *EDGES,
        *NORMS,
        *LATENT,
        *routed_table(),
        Ignored("model.layers.61.{name}", "predicts the token after the next; transformers leaves it out as well"),
    ),
    read=read,
    write=write,
    examples=examples,
)
