"""ModernBERT (Warner et al. 2024, arXiv 2412.13663): an encoder with windows on both sides in most layers.

The model of `AutoModel`, without a head; of checkpoints with the head of masked words that head is left aside. What was
loaded is an `Encoder`; with an embedding head on top, to be trained on pairs:

    encoder = convert.load(folder).model
    model = Headed(encoder=encoder.config, head=EmbeddingHead()).build()
    model.encoder.load_state_dict(encoder.state_dict())
"""

from __future__ import annotations

from typing import Any

from ...core.errors import UserError
from ...models.config import Encoder
from ..checkpoint.family import Family
from ..checkpoint.fields import Fields
from ..checkpoint.rules import Table
from ..checkpoint.tensors import Tensors
from .shared.bert import Bare, bert_rules, read_encoder, write_encoder

__all__ = ["FAMILY"]

_MASKED = "ModernBertForMaskedLM"


def read(fields: Fields) -> Encoder:
    return read_encoder(fields)


def write(config: Any) -> dict[str, Any]:
    if not isinstance(config, Encoder):
        raise UserError(f"{type(config).__name__} is no Encoder, which this family needs")
    return write_encoder(config)


def unpack(theirs: Tensors, data: Any) -> Tensors:
    return Bare(theirs, "model.", ("head.", "decoder.")) if data.get("architectures") == [_MASKED] else theirs


def examples() -> dict[str, dict[str, Any]]:
    base = {
        "vocab_size": 41,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "local_attention": 6,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "cls_token_id": 1,
        "eos_token_id": 2,
        "sep_token_id": 2,
    }
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    theta = {"full_attention": 5000.0, "sliding_attention": 100.0}
    rope = {kind: {"rope_type": "default", "rope_theta": base} for kind, base in theta.items()}
    odd = {"layer_types": kinds, "attention_bias": True, "norm_bias": True, "norm_eps": 1e-3, "rope_parameters": rope}
    return {"plain": base, "odd": base | odd | {"hidden_activation": "relu"}}


TABLE: Table = bert_rules("", "")

FAMILY = Family(
    model_type="modernbert",
    architecture="ModernBertModel",
    table=TABLE,
    read=read,
    write=write,
    examples=examples,
    unpack=unpack,
    also=(_MASKED,),
)
