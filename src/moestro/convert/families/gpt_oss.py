"""GPT-OSS (Agarwal et al. 2025, arXiv 2508.10925): attention sinks, every second layer windowed, clamped experts with
biases, weights of experts on disk as MXFP4 blocks or not. Exports are not quantised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...core.errors import UserError
from ...experts.config import ClampedGated
from ...models.config import Block, Decoder
from ...moe.config import MoELayer
from ...nn.config import Attention, RMSNorm
from ...routers.config import Linear, Router, SoftmaxKept, TopK
from ..checkpoint.family import Family
from ..checkpoint.fields import Fields
from ..checkpoint.mxfp4 import Dequantised
from ..checkpoint.rules import ByExpert, Copy, Interleaved, Table, Transpose
from ..checkpoint.tensors import Tensors
from .shared.layouts import ATTENTION, EDGES, NORMS
from .shared.parts import attention_of, balance, balance_coefficient, decoder, heads, num_layers, one, write_decoder
from .shared.rope import read_rotary, write_rotary

__all__ = ["FAMILY"]

_SLIDING, _FULL = "sliding_attention", "full_attention"
_ROPE = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}


def read(fields: Fields) -> Decoder:
    fields.only("hidden_act", "silu")
    if fields.has("quantization_config"):
        method = fields.data["quantization_config"].get("quant_method")
        if method != "mxfp4":
            raise fields.error("quantization_config", f"quant_method {method!r} cannot be read; known: 'mxfp4'")
    if not fields.has("rope_parameters") and not fields.has("rope_scaling"):
        fields.data["rope_parameters"] = _ROPE
    layers = num_layers(fields)
    default = [_FULL if i % 2 else _SLIDING for i in range(layers)]
    kinds = fields.strings("layer_types") or default
    window = fields.take("sliding_window", int, None)
    if len(kinds) != layers or set(kinds) - {_SLIDING, _FULL}:
        raise fields.error("layer_types", f"expected {layers} of {_SLIDING!r} and {_FULL!r}, found {kinds!r}")
    norm = RMSNorm(eps=fields.take("rms_norm_eps", float, 1e-5))
    attention = Attention(
        **heads(fields, kv=8, head_dim=64),
        bias="all" if fields.take("attention_bias", bool, True) else "none",
        positions=read_rotary(fields, default_theta=150_000.0),
        sinks=True,
    )
    moe = MoELayer(
        num_experts=fields.take("num_local_experts", int, 128, also=("num_experts",)),
        router=Router(
            score=Linear(bias=True),
            select=TopK(k=fields.take("num_experts_per_tok", int, 4, also=("experts_per_token",))),
            weigh=SoftmaxKept(),
        ),
        experts=ClampedGated(
            width=fields.take("intermediate_size", int, 2880),
            alpha=fields.take("swiglu_alpha", float, 1.702),
            limit=fields.take("swiglu_limit", float, 7.0),
        ),
        losses=balance(fields),
    )
    blocks = tuple(
        Block(mixer=attention.replace(window=window if kind == _SLIDING else None), ffn=moe, norm=norm)
        for kind in kinds
    )
    return decoder(fields, lambda _: blocks, norm=norm)


def write(config: Decoder) -> dict[str, Any]:
    fields = write_decoder(config)
    blocks = config.resolved()
    windows = [attention_of(block).window for block in blocks]
    attention = one([attention_of(block).replace(window=None) for block in blocks], "attention")
    layer = one([block.ffn for block in blocks], "ffn")
    if not isinstance(layer, MoELayer) or not isinstance(layer.experts, ClampedGated):
        raise UserError("ffn: has no place in this family; it needs MoELayer with ClampedGated experts")
    if not isinstance(layer.router, Router) or not isinstance(layer.router.select, TopK):
        raise UserError("router: has no place in this family; it needs Router(select=TopK(...))")
    return {
        **fields,
        **write_rotary(attention.positions),
        "attention_bias": attention.bias == "all",
        "sliding_window": one([w for w in windows if w is not None] or [None], "window"),
        "layer_types": [_FULL if w is None else _SLIDING for w in windows],
        "num_local_experts": layer.num_experts,
        "num_experts_per_tok": layer.router.select.k,
        "intermediate_size": layer.experts.width,
        "swiglu_alpha": layer.experts.alpha,
        "swiglu_limit": layer.experts.limit,
        "hidden_act": "silu",
        "router_aux_loss_coef": balance_coefficient(layer),
    }


def unpack(tensors: Tensors, source: Mapping[str, Any]) -> Tensors:
    """Blocks of MXFP4 as the matrices that they stand for."""
    return Dequantised(tensors) if any(name.endswith("_blocks") for name in tensors.entries()) else tensors


def examples() -> dict[str, dict[str, Any]]:
    base = {
        "vocab_size": 41,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "sliding_window": 5,
        "max_position_embeddings": 64,
    }
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False}
    other = {"swiglu_limit": 0.2, "swiglu_alpha": 1.3, "attention_bias": False, "tie_word_embeddings": True}
    return {
        "plain": base | {"rope_parameters": {**yarn, "rope_theta": 10_000.0, "beta_fast": 4.0}},
        "released_rope": base | {"num_key_value_heads": 4},
        "other": base
        | other
        | {"layer_types": [_FULL, _SLIDING, _SLIDING], "rope_parameters": {"rope_type": "default"}},
    }


_OURS, _THEIRS = "layers.{layer}.ffn.experts.", "model.layers.{layer}.mlp.experts."
_ROUTER = "layers.{layer}.ffn.router.score.", "model.layers.{layer}.mlp.router."

TABLE: Table = (
    *EDGES,
    *NORMS,
    *ATTENTION,
    Copy("layers.{layer}.mixer.sinks", "model.layers.{layer}.self_attn.sinks"),
    *(Copy(_ROUTER[0] + part, _ROUTER[1] + part) for part in ("weight", "bias")),
    ByExpert(_OURS + "gate_up", _THEIRS + "gate_up_proj", steps=(Transpose(), Interleaved(1))),
    Copy(_OURS + "gate_up_bias", _THEIRS + "gate_up_proj_bias", steps=(Interleaved(1),)),
    ByExpert(_OURS + "down", _THEIRS + "down_proj", steps=(Transpose(),)),
    Copy(_OURS + "down_bias", _THEIRS + "down_proj_bias"),
)

FAMILY = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    table=TABLE,
    read=read,
    write=write,
    examples=examples,
    unpack=unpack,
)
