"""DeepSeek-V2 (DeepSeek-AI 2024, arXiv 2405.04434)."""

from __future__ import annotations

from typing import Any

from ...core.errors import UserError
from ...losses.config import PerUnitBalance
from ...models.config import Decoder
from ...moe.config import MoELayer
from ...routers.config import GroupLimited, Raw, Router, Select, TopK
from ..checkpoint.family import Family
from ..checkpoint.fields import Fields
from .shared.latent import LATENT, read_latent, write_latent
from .shared.layouts import EDGES, NORMS
from .shared.mixed import (
    chosen,
    first_dense,
    leading,
    routed_layer,
    routed_table,
    split_layers,
    write_first_dense,
    write_routed,
)
from .shared.parts import decoder, write_common

__all__ = ["FAMILY"]


def read_router(fields: Fields) -> Router:
    """Softmax scores, the best groups by their highest score, weights as they are times a factor."""
    fields.only("scoring_func", "softmax")
    fields.only("norm_topk_prob", False)  # transformers does not look at it
    select: Select = TopK(k=fields.take("num_experts_per_tok", int))
    if fields.only("topk_method", "greedy", "group_limited_greedy") == "group_limited_greedy":
        groups, kept = fields.take("n_group", int), fields.take("topk_group", int)
        select = GroupLimited(groups=groups, kept=kept, by="max", inner=select)
    return Router(select=select, weigh=Raw(scale=fields.take("routed_scaling_factor", float, 1.0)))


def write_router(layer: MoELayer) -> dict[str, Any]:
    router, found = chosen(layer, "softmax")
    if found.biased or not isinstance(router.weigh, Raw):
        raise UserError("router: this family selects without a bias, and its weights are Raw")
    out: dict[str, Any] = {
        "num_experts_per_tok": found.k,
        "norm_topk_prob": False,
        "routed_scaling_factor": router.weigh.scale,
        "topk_method": "greedy",
        "n_group": None,
        "topk_group": None,
    }
    if found.groups is not None:
        groups = {"n_group": found.groups.groups, "topk_group": found.groups.kept}
        out |= {"topk_method": "group_limited_greedy", **groups}
    return out


def read(fields: Fields) -> Decoder:
    fields.only("mlp_bias", False)
    balance = fields.take("aux_loss_alpha", float, 0.0)
    losses = (PerUnitBalance(coefficient=balance),) if balance else ()
    router = read_router(fields)
    return decoder(
        fields,
        attention=read_latent(fields),
        ffn=leading(fields),
        moe=routed_layer(fields, router, defaults=(64, 2, 1407), losses=losses),
        layout=first_dense(fields, 0),
    )


def write(config: Decoder) -> dict[str, Any]:
    dense, routed = split_layers(config)
    return {
        **write_common(config),
        **write_latent(config),
        **write_first_dense(config),
        **write_routed(routed, dense),
        **write_router(routed),
    }


def examples() -> dict[str, dict[str, Any]]:
    base = {
        "vocab_size": 41,
        "hidden_size": 24,
        "intermediate_size": 28,
        "moe_intermediate_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "q_lora_rank": None,
        "kv_lora_rank": 10,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 7,
        "max_position_embeddings": 64,
    }
    yarn = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 4,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "rope_theta": 10000.0,
    }
    groups = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0}
    return {
        "lite": {**base, "rope_parameters": yarn, "aux_loss_alpha": 0.001},
        "groups": {**base, **groups, "q_lora_rank": 12, "attention_bias": True, "num_key_value_heads": 3},
        "routed": {**base, "first_k_dense_replace": 0, "num_experts_per_tok": 1, "n_shared_experts": 1},
    }


FAMILY = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    table=(*EDGES, *NORMS, *LATENT, *routed_table()),
    read=read,
    write=write,
    examples=examples,
)
