"""Latent attention in DeepSeek's layout: fields and rules."""

from __future__ import annotations

from typing import Any

from ....core.errors import UserError
from ....models.config import Decoder
from ....nn.config import LatentAttention
from ...checkpoint.fields import Fields
from ...checkpoint.rules import Copy, Table
from .parts import one
from .rope import read_rotary, write_rotary

__all__ = ["LATENT", "read_latent", "write_latent"]

LATENT: Table = tuple(
    Copy(f"layers.{{layer}}.mixer.{ours}.{part}", f"model.layers.{{layer}}.self_attn.{theirs}.{part}")
    for ours, theirs, parts in (
        ("q", "q_proj", ("weight",)),
        ("q_down", "q_a_proj", ("weight", "bias")),
        ("q_norm", "q_a_layernorm", ("weight",)),
        ("q_up", "q_b_proj", ("weight",)),
        ("kv_down", "kv_a_proj_with_mqa", ("weight", "bias")),
        ("kv_norm", "kv_a_layernorm", ("weight",)),
        ("kv_up", "kv_b_proj", ("weight",)),
        ("o", "o_proj", ("weight", "bias")),
    )
    for part in parts
)
"""Latent attention, with or without compressed queries."""


def read_latent(fields: Fields, style: str = "interleaved") -> LatentAttention:
    """Latent attention. Its norms have the epsilon 1e-6 whatever `rms_norm_eps` is, in the released code and since."""
    count = fields.take("num_attention_heads", int)
    if fields.take("num_key_value_heads", int, count) != count:
        raise fields.error("num_key_value_heads", f"must be num_attention_heads, {count}, in latent attention")
    positions = read_rotary(fields, style=style)
    if positions.fraction != 1.0:
        raise fields.error("partial_rotary_factor", "has no meaning in latent attention; use qk_rope_head_dim")
    return LatentAttention(
        num_heads=count,
        q_rank=fields.take("q_lora_rank", int, None),
        kv_rank=fields.take("kv_lora_rank", int, 512),
        nope_dim=fields.take("qk_nope_head_dim", int, 128),
        rope_dim=fields.take("qk_rope_head_dim", int, 64),
        value_dim=fields.take("v_head_dim", int, 128),
        bias=fields.take("attention_bias", bool, False),
        positions=positions,
    )


def write_latent(config: Decoder, *, any_style: bool = False) -> dict[str, Any]:
    """The fields of latent attention that is the same in all layers. any_style: with `rope_interleave`."""
    mixer = one([block.mixer for block in config.resolved()], "attention")
    if type(mixer) is not LatentAttention:
        raise UserError(f"mixer: {type(mixer).__name__} has no place in this family; it needs LatentAttention")
    style = mixer.positions.style if any_style else "interleaved"
    return {
        **({"rope_interleave": style == "interleaved"} if any_style else {}),
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_heads,
        "q_lora_rank": mixer.q_rank,
        "kv_lora_rank": mixer.kv_rank,
        "qk_nope_head_dim": mixer.nope_dim,
        "qk_rope_head_dim": mixer.rope_dim,
        "v_head_dim": mixer.value_dim,
        "attention_bias": mixer.bias,
        **write_rotary(mixer.positions, style=style),
    }
