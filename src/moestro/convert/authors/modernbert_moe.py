"""Contrastive MoE embeddings, second generation (34, arXiv 2401.15713): ModernBERT with an expert per domain.

Gleghorn-Lab/Mixture-of-Experts-Sentence-Similarity. Its config.json says `model_type` "modernbert"; the fields
`num_experts` and `loss_type` tell it from ModernBERT's (`convert.borrowed`). The domain of a text is the signal
`label` of its tokens, 0 to E - 1 in the order of the domain tokens: [COPD] [CVD] [CANCER] [PARASITIC] [AUTOIMMUNE],
which stand in place of [CLS]. With one expert or none the feed-forward layers are dense.
"""

from __future__ import annotations

from typing import Any

from ...core.errors import UserError
from ...experts.config import Gated
from ...models.config import Headed
from ...models.heads_config import EmbeddingHead
from ...moe.config import MoELayer
from ...nn.config import FeedForward
from ...routers.config import Constant, Label, Router, Uniform
from ..checkpoint.family import Family
from ..checkpoint.fields import Fields
from ..checkpoint.rules import Copy, Stack, Table
from ..families import modernbert
from ..families.shared.bert import bert_rules, read_encoder, write_encoder
from ..families.shared.parts import one

__all__ = ["FAMILY"]

_LOSSES = ("clip", "mnr", "mnr_plus")


def read(fields: Fields) -> Headed:
    fields.only("loss_type", *_LOSSES)  # of training
    fields.only("lora", False)
    count = fields.take("num_experts", int, 5)
    if count < 0:
        raise fields.error("num_experts", f"{count} is no number of experts")

    def routed(dense: FeedForward) -> MoELayer:
        return MoELayer(
            num_experts=count,
            router=Router(score=Uniform(), select=Label(), weigh=Constant(value=1.0)),
            experts=Gated(width=dense.width, activation=dense.activation),
            losses=(),
        )

    return Headed(encoder=read_encoder(fields, routed if count > 1 else None), head=EmbeddingHead())


def write(config: Any) -> dict[str, Any]:
    if not isinstance(config, Headed) or not isinstance(config.head, EmbeddingHead):
        raise UserError(f"{type(config).__name__} is no encoder with an EmbeddingHead, which this layout needs")
    layers = [b.ffn for b in config.encoder.resolved() if isinstance(b.ffn, MoELayer)]
    count = one([layer.num_experts for layer in layers], "num_experts") if layers else 1
    return write_encoder(config.encoder) | {"num_experts": count, "loss_type": "mnr_plus"}


def examples() -> dict[str, dict[str, Any]]:
    base = modernbert.examples()["plain"] | {"loss_type": "mnr_plus"}
    return {"experts": base | {"num_experts": 3}, "dense": base | {"num_experts": 1, "loss_type": "clip"}}


_MLP = "bert.layers.{layer}.mlp.experts.{expert}."

TABLE: Table = (
    *bert_rules("encoder.", "bert."),
    Stack("encoder.layers.{layer}.ffn.experts.gate_up", f"{_MLP}Wi.weight"),
    Stack("encoder.layers.{layer}.ffn.experts.down", f"{_MLP}Wo.weight"),
    *(
        Copy(f"head.{ours}.{part}", f"pooler.{theirs}.{part}")
        for ours, theirs in (("norm", "layernorm"), ("first", "w1"), ("second", "w2"))
        for part in ("weight", "bias")
    ),
)

FAMILY = Family(
    model_type="modernbert_moe",
    architecture="ModernBertForSentenceSimilarity",
    table=TABLE,
    read=read,
    write=write,
    examples=examples,
    says="modernbert",
    also=None,  # the name of the authors' class is not in what was read
)
