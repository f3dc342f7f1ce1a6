"""Decoders whose layers are dense here and routed there, and DeepSeek's router: fields and rules."""

from __future__ import annotations

from typing import Any, NamedTuple

from ....core.errors import UserError
from ....experts.config import Gated
from ....losses.config import Loss
from ....models.config import Decoder
from ....moe.config import MoELayer
from ....nn.config import FeedForward
from ....routers.config import GroupLimited, LossFree, Raw, Renormalised, Router, Select, TopK
from ...checkpoint.fields import Fields
from ...checkpoint.rules import Copy, Reshape, Table
from .layouts import DENSE, experts, shared_expert
from .parts import ACTIVATIONS, activation_field, num_layers, one

__all__ = [
    "Chosen",
    "biased_router",
    "chosen",
    "first_dense",
    "leading",
    "routed_layer",
    "routed_table",
    "split_layers",
    "write_biased_router",
    "write_first_dense",
    "write_routed",
]


# Layers -------------------------------------------------------------------------------------------------------------


def first_dense(fields: Fields, default: int) -> tuple[Any, ...]:
    """Kinds of layers: the first `first_k_dense_replace` are dense."""
    layers = num_layers(fields)
    count = fields.take("first_k_dense_replace", int, default)
    if count < 0:
        raise fields.error("first_k_dense_replace", f"{count} is below 0")
    fields.only("moe_layer_freq", 1)
    return ("dense",) * min(count, layers) + ("moe",) * (layers - min(count, layers))


def leading(fields: Fields) -> FeedForward:
    """The FFN of dense layers."""
    return FeedForward(
        width=fields.take("intermediate_size", int), activation=fields.choice("hidden_act", ACTIVATIONS, "silu")
    )


def split_layers(config: Decoder) -> tuple[FeedForward | None, MoELayer]:
    """The dense and the routed FFN, each the same wherever it stands; a dense one may be lacking."""
    if not isinstance(config, Decoder):
        raise UserError(f"{type(config).__name__} is no Decoder, which this family needs")
    ffns = [block.ffn for block in config.resolved()]
    for ffn in ffns:
        if not isinstance(ffn, FeedForward | MoELayer):
            raise UserError(f"ffn: {type(ffn).__name__} has no place in this family")
    dense = [ffn for ffn in ffns if isinstance(ffn, FeedForward)]
    routed = [ffn for ffn in ffns if isinstance(ffn, MoELayer)]
    if not routed:
        raise UserError("ffn: no layer is routed, which this family cannot express; choose a dense one")
    return one(dense, "the dense ffn") if dense else None, one(routed, "the routed layer")


def write_first_dense(config: Decoder) -> dict[str, Any]:
    kinds = config.kinds()
    count = kinds.index("moe") if "moe" in kinds else len(kinds)
    if "dense" in kinds[count:]:
        raise UserError("layout: dense layers after routed ones, which this family cannot express")
    return {"first_k_dense_replace": count}


# The routed layer ---------------------------------------------------------------------------------------------------


def routed_layer(
    fields: Fields,
    router: Router,
    *,
    experts: str = "n_routed_experts",
    shared: str = "n_shared_experts",
    defaults: tuple[int, int, int],
    losses: tuple[Loss, ...] = (),
) -> MoELayer:
    """Routed experts and n shared ones, which are one expert of n times the width.

    experts, shared: names of the fields with their numbers. defaults: of experts, of shared ones, of the width.
    """
    width = fields.take("moe_intermediate_size", int, defaults[2])
    activation = fields.choice("hidden_act", ACTIVATIONS, "silu")
    count = fields.take(shared, int, defaults[1])
    if count < 0:
        raise fields.error(shared, f"{count} is below 0")
    return MoELayer(
        num_experts=fields.take(experts, int, defaults[0], also=("num_experts", "num_local_experts")),
        router=router,
        experts=Gated(width=width, activation=activation),
        shared=Gated(width=count * width, activation=activation) if count else None,
        losses=losses,
    )


def write_routed(
    layer: MoELayer, dense: FeedForward | None, *, experts: str = "n_routed_experts", shared: str = "n_shared_experts"
) -> dict[str, Any]:
    """What `routed_layer` and `leading` read. Without a dense layer its width, which nothing has, is an expert's."""
    bank, extra = layer.experts, layer.shared
    if type(bank) is not Gated or not isinstance(bank.width, int):
        raise UserError("experts: have no place in this family; it needs Gated experts of one width")
    count = 0
    if extra is not None:
        if type(extra) is not Gated or not isinstance(extra.width, int) or extra.width % bank.width:
            raise UserError("shared: must be Gated, of a multiple of the experts' width, in this family")
        count = extra.width // bank.width
    return {
        experts: layer.num_experts,
        shared: count,
        "moe_intermediate_size": bank.width,
        "intermediate_size": bank.width if dense is None else dense.width,
        "hidden_act": activation_field(bank.activation),
    }


def routed_table(bias: str = "gate.e_score_correction_bias", *, rows: bool = False) -> Table:
    """Dense FFNs, experts, shared experts and the bias of the selection; rows: the bias is stored as [1, E]."""
    steps = (Reshape((-1,), (1, -1)),) if rows else ()
    correction = Copy("layers.{layer}.ffn.router.select.bias", f"model.layers.{{layer}}.mlp.{bias}", steps)
    return (*DENSE, *experts(), *shared_expert(), correction)


# The router ---------------------------------------------------------------------------------------------------------


class Chosen(NamedTuple):
    """What a router selects by. groups: None = all experts are one group."""

    k: int
    groups: GroupLimited | None
    biased: bool


def chosen(layer: MoELayer, activation: str) -> tuple[Router, Chosen]:
    """The router of a layer and its selection. Raises `UserError` for another kind."""
    router = layer.router
    if not isinstance(router, Router) or router.activation != activation:
        raise UserError(f"router: has no place in this family; it needs Router(activation={activation!r})")
    select: Select = router.select
    biased = isinstance(select, LossFree)
    if isinstance(select, LossFree):
        select = select.inner
    groups = select if isinstance(select, GroupLimited) else None
    if isinstance(select, GroupLimited):
        select = select.inner
    if not isinstance(select, TopK):
        raise UserError(f"router.select: {type(select).__name__} has no place in this family; it needs TopK")
    return router, Chosen(select.k, groups, biased)


def biased_router(fields: Fields, *, k: int, groups: int, kept: int, scale: float) -> Router:
    """DeepSeek-V3's router: sigmoid scores, the best groups by their two highest biased scores, renormalised weights.

    k, groups, kept, scale: the family's defaults. Weights are divided by their sum plus 1e-20, as released.
    """
    fields.only("scoring_func", "sigmoid")
    fields.only("topk_method", "noaux_tc")
    k = fields.take("num_experts_per_tok", int, k)
    groups = fields.take("n_group", int, groups)
    kept = fields.take("topk_group", int, kept)
    scale = fields.take("routed_scaling_factor", float, scale)
    select: Select = TopK(k=k)
    if groups > 1:
        select = GroupLimited(groups=groups, kept=kept, by="top2", inner=select)
    if not fields.take("norm_topk_prob", bool, True):
        return Router(activation="sigmoid", select=LossFree(inner=select), weigh=Raw(scale=scale))
    if k == 1:
        raise fields.error("norm_topk_prob", "with one expert per token every weight is the same; nothing is routed")
    weigh = Renormalised(scale=scale, epsilon=1e-20)
    return Router(activation="sigmoid", select=LossFree(inner=select), weigh=weigh)


def write_biased_router(layer: MoELayer) -> dict[str, Any]:
    """What `biased_router` reads."""
    router, found = chosen(layer, "sigmoid")
    if not found.biased:
        raise UserError("router.select: this family selects with a bias; wrap it in LossFree(inner=...)")
    if not isinstance(router.weigh, Raw | Renormalised):
        raise UserError(f"router.weigh: {type(router.weigh).__name__} has no place in this family")
    return {
        "num_experts_per_tok": found.k,
        "n_group": found.groups.groups if found.groups else 1,
        "topk_group": found.groups.kept if found.groups else 1,
        "routed_scaling_factor": router.weigh.scale,
        "norm_topk_prob": isinstance(router.weigh, Renormalised),
    }
