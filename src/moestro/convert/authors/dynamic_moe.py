"""Dynamic routing by top-p (Huang et al. 2024, arXiv 2403.07652): AnLan577/Dynamic_MoE.

Its config.json says `model_type` "llama"; the fields `top_p_threshold` and `expert_frequency` tell it from Llama's
(`convert.borrowed`). Layers whose number is a multiple of `expert_frequency` are routed. `num_key_value_heads` and
`experts_topk` are there without being used. The buffers `rotary_emb.inv_freq` follow from the config and are neither
read nor written: the authors' class makes them anew. Their bfloat16 choices: `TopP(as_released=True)`.
"""

from __future__ import annotations

from typing import Any

from ...core.errors import UserError
from ...experts.config import Gated
from ...losses.config import PerUnitBalance, RoutingEntropy
from ...models.config import Decoder
from ...moe.config import MoELayer
from ...nn.config import Attention, FeedForward, Rotary
from ...routers.config import Raw, Router, TopP
from ..checkpoint.family import Family
from ..checkpoint.fields import Fields
from ..checkpoint.rules import Copy, Fuse, Table
from ..families.shared.layouts import ATTENTION, EDGES, experts
from ..families.shared.parts import (
    ACTIVATIONS,
    activation_field,
    attention_of,
    decoder,
    num_layers,
    one,
    write_common,
)

__all__ = ["FAMILY"]


def _kinds(layers: int, every: int) -> tuple[Any, ...]:
    return tuple("dense" if i % every else "moe" for i in range(layers))


def read(fields: Fields) -> Decoder:
    fields.only("rope_theta", 10_000.0)
    fields.only("rope_scaling", None)
    fields.only("attention_bias", False)
    fields.only("pretraining_tp", 1)
    for unused in ("num_key_value_heads", "experts_topk"):
        fields.take(unused, int, None)
    count, every = fields.take("num_experts", int, -1), fields.take("expert_frequency", int, 2)
    if count < 1:
        raise fields.error("num_experts", f"{count} is no number of experts; the checkpoint's own config.json has one")
    if every < 1:
        raise fields.error("expert_frequency", f"{every} must be at least 1: every how many layers one is routed")
    width = fields.take("intermediate_size", int, 11_008)
    activation = fields.choice("hidden_act", ACTIVATIONS, "silu")
    return decoder(
        fields,
        attention=Attention(num_heads=fields.take("num_attention_heads", int, 32)),
        ffn=FeedForward(width=width, activation=activation),
        moe=MoELayer(
            num_experts=count,
            router=Router(select=TopP(p=fields.take("top_p_threshold", float, 0.4)), weigh=Raw()),
            experts=Gated(width=width, activation=activation),
            losses=(PerUnitBalance(coefficient=1e-2), RoutingEntropy(coefficient=1e-4)),
        ),
        layout=_kinds(num_layers(fields), every),
    )


def write(config: Any) -> dict[str, Any]:
    fields = write_common(config)
    blocks = config.resolved()
    mixers = [attention_of(b) for b in blocks]
    if mixers[0].positions != Rotary():
        raise UserError("positions: this family's are plain rotary ones of base 10000")
    layers = [b.ffn for b in blocks if isinstance(b.ffn, MoELayer)]
    if not layers:
        raise UserError("layout: no block has a MoELayer, which this family needs")
    layer = one(layers, "moe")
    if not isinstance(layer.router, Router) or not isinstance(layer.router.select, TopP):
        raise UserError("router: has no place in this family; it needs Router(select=TopP(...), weigh=Raw())")
    if type(layer.experts) is not Gated or not isinstance(layer.experts.width, int):
        raise UserError("experts: have no place in this family; it needs Gated experts of one width")
    if any(not isinstance(b.ffn, FeedForward | MoELayer) for b in blocks):
        raise UserError("ffn: this family needs a FeedForward or a MoELayer in every block")
    heads = one([m.num_heads for m in mixers], "num_heads")
    kinds = list(config.kinds())
    return fields | {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_experts": layer.num_experts,
        "expert_frequency": kinds.index("moe", 1) if "moe" in kinds[1:] else max(1, len(kinds)),
        "top_p_threshold": layer.router.select.p,
        "intermediate_size": layer.experts.width,
        "hidden_act": activation_field(layer.experts.activation),
        "rope_theta": 10_000.0,
    }


def examples() -> dict[str, dict[str, Any]]:
    base = {
        "vocab_size": 41,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts": 6,
        "experts_topk": 2,
        "expert_frequency": 1,
        "top_p_threshold": 0.4,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 64,
    }
    return {"every layer": base, "every second layer": base | {"expert_frequency": 2, "top_p_threshold": 0.7}}


_OURS, _THEIRS = "layers.{layer}.", "model.layers.{layer}."

TABLE: Table = (
    *EDGES,
    Copy(_OURS + "mixer_norm.weight", _THEIRS + "input_norm.weight"),
    Copy(_OURS + "ffn_norm.weight", _THEIRS + "post_attention_norm.weight"),
    *ATTENTION,
    *experts(router="router"),
    Fuse(_OURS + "ffn.gate_up", (_THEIRS + "mlp.mlp.gate_proj.weight", _THEIRS + "mlp.mlp.up_proj.weight")),
    Copy(_OURS + "ffn.down", _THEIRS + "mlp.mlp.down_proj.weight"),
)

FAMILY = Family(
    model_type="dynamic_moe",
    architecture="MoEForCausalLM",
    table=TABLE,
    read=read,
    write=write,
    examples=examples,
    says="llama",
)
"""Recognised by its own fields; `to="dynamic_moe"` writes it."""
