"""ERNIE 4.5 (Baidu 2025, technical report): biased selection by softmax probabilities, routed layers at an interval."""

from __future__ import annotations

from typing import Any

from ...core.errors import UserError
from ...models.config import Decoder
from ...nn.config import Attention, RMSNorm
from ...routers.config import LossFree, Renormalised, Router, TopK
from ..checkpoint.family import Family
from ..checkpoint.fields import Fields
from ..checkpoint.rules import Ignored
from .shared.layouts import ATTENTION, EDGES, NORMS
from .shared.mixed import chosen, leading, routed_layer, routed_table, split_layers, write_routed
from .shared.parts import attention_of, balance, balance_coefficient, decoder, heads, num_layers, one, write_decoder
from .shared.rope import read_rotary, write_rotary

__all__ = ["FAMILY"]

_NAMES = {"experts": "moe_num_experts", "shared": "moe_num_shared_experts"}


def routed_at(layers: int, start: int, end: int, interval: int) -> tuple[Any, ...]:
    """Kinds of layers: routed from `start` to `end`, both included, where the number of the layer divides."""
    return tuple("moe" if (i + 1) % interval == 0 and start <= i <= end else "dense" for i in range(layers))


def read_layout(fields: Fields) -> tuple[Any, ...]:
    layers = num_layers(fields)
    interval = fields.take("moe_layer_interval", int, 1)
    if interval < 1:
        raise fields.error("moe_layer_interval", f"{interval} is below 1")
    end = fields.take("moe_layer_end_index", int, -1)
    start = fields.take("moe_layer_start_index", int, 1)
    return routed_at(layers, start, layers - 1 if end == -1 else end, interval)


def write_layout(config: Decoder) -> dict[str, int]:
    kinds = config.kinds()
    routed = [i for i, kind in enumerate(kinds) if kind == "moe"]
    start, end = routed[0], routed[-1]
    for interval in range(1, len(kinds) + 1):
        if routed_at(len(kinds), start, end, interval) == kinds:
            return {
                "moe_layer_start_index": start,
                "moe_layer_end_index": end,
                "moe_layer_interval": interval,
            }
    raise UserError("layout: routed layers do not come at an interval, which this family cannot express")


def read(fields: Fields) -> Decoder:
    fields.only("use_bias", False)
    k = fields.take("moe_k", int, 6, also=("num_experts_per_tok",))
    if k == 1:
        raise fields.error("moe_k", "with one expert per token every weight is 1, and no router can be trained")
    floor = fields.take("moe_norm_min", float, 1e-12)
    router = Router(select=LossFree(inner=TopK(k=k)), weigh=Renormalised(floor=floor))
    return decoder(
        fields,
        attention=Attention(
            **heads(fields, kv=4), positions=read_rotary(fields, default_theta=500_000.0, style="interleaved")
        ),
        ffn=leading(fields),
        moe=routed_layer(fields, router, **_NAMES, defaults=(64, 2, 1536), losses=balance(fields)),
        layout=read_layout(fields),
        norm=RMSNorm(eps=fields.take("rms_norm_eps", float, 1e-5)),
    )


def write(config: Decoder) -> dict[str, Any]:
    dense, routed = split_layers(config)
    attention = one([attention_of(block) for block in config.resolved()], "attention")
    router, found = chosen(routed, "softmax")
    if not found.biased or found.groups is not None or not isinstance(router.weigh, Renormalised):
        raise UserError("router: this family needs LossFree(inner=TopK(...)) and Renormalised weights")
    fields = write_decoder(config)
    if fields["head_dim"] * fields["num_attention_heads"] == config.dim:
        del fields["head_dim"]  # this family has no such field
    return {
        **fields,
        **write_rotary(attention.positions, style="interleaved"),
        "use_bias": False,
        "moe_k": found.k,
        "moe_norm_min": router.weigh.floor,
        "router_aux_loss_coef": balance_coefficient(routed),
        **write_layout(config),
        **write_routed(routed, dense, **_NAMES),
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
        "moe_num_experts": 8,
        "moe_k": 3,
        "max_position_embeddings": 64,
    }
    interval = {"num_hidden_layers": 5, "moe_layer_start_index": 1, "moe_layer_end_index": 3, "moe_layer_interval": 2}
    return {
        "plain": base,
        "interval": {**base, **interval, "moe_num_shared_experts": 0, "tie_word_embeddings": False},
        "floor": {**base, "moe_norm_min": 0.4, "moe_layer_start_index": 0, "rope_theta": 10_000.0},
    }


FAMILY = Family(
    model_type="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    table=(
        *EDGES,
        *NORMS,
        *ATTENTION,
        *routed_table("moe_statics.e_score_correction_bias", rows=True),
        Ignored("model.mtp_{name}", "predicts the token after the next; transformers leaves it out as well"),
    ),
    read=read,
    write=write,
    examples=examples,
)
