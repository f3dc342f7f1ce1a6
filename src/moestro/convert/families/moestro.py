"""The library's own folders: config.json holds the model's config, tensors have our names behind `model.`."""

from __future__ import annotations

from typing import Any

from ...core.config import Config
from ...experts.config import Gated
from ...models.config import Decoder, EncoderDecoder, Stack
from ...moe.config import MoELayer
from ...nn.config import Attention, FeedForward
from ...routers.config import LossFree, Router, TopK
from ..checkpoint.family import Family
from ..checkpoint.fields import Fields
from ..checkpoint.rules import Copy

__all__ = ["FAMILY"]


def read(fields: Fields) -> Config:
    data = fields.take("model", dict)
    config = Config.from_dict({"type": Decoder.type_name(), **data}, where=f"{fields.where}: model")
    if not isinstance(config, Stack | EncoderDecoder):
        raise fields.error("model", f"{type(config).__name__} describes no model")
    return config


def write(config: Config) -> dict[str, Any]:
    return {"model": config.to_dict()}


def examples() -> dict[str, dict[str, Any]]:
    attention = Attention(num_heads=4, num_kv_heads=2)
    router = Router(activation="sigmoid", select=LossFree(inner=TopK(k=2)))
    moe = MoELayer(num_experts=4, router=router, experts=Gated(width=(4, 8, 12, 8)), shared=Gated(width=12))
    model = Decoder(
        vocab_size=41,
        dim=24,
        num_layers=3,
        context=64,
        attention=attention,
        ffn=FeedForward(width=20),
        moe=moe,
        layout=("dense", "moe", "moe"),
        seed=3,
    )
    return {"mixed": {"model": model.to_dict()}}


FAMILY = Family(
    model_type="moestro",
    architecture="MoestroForCausalLM",
    table=(Copy("{name}", "model.{name}"),),
    read=read,
    write=write,
    examples=examples,
)
