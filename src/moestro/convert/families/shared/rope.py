"""Rotary positions in a config.json: `rope_parameters`, and the older `rope_theta` with `rope_scaling`."""

from __future__ import annotations

import math
from typing import Any

from ....core.errors import UserError
from ....nn.config import Interpolated, Llama3, LongRoPE, Positions, Rotary, Scaling, YaRN
from ...checkpoint.fields import Fields

__all__ = ["LEGACY", "read_rotary", "write_rotary"]

LEGACY = ("rope_theta", "rope_scaling", "partial_rotary_factor")
"""Older fields, which `rope_parameters` replaces."""


def read_rotary(fields: Fields, *, default_theta: float = 10_000.0, style: Any = "half") -> Rotary:
    """The rotary positions that the fields describe. Raises `UserError` for a kind that is not known."""
    given: dict[str, Any] = dict(fields.take("rope_parameters", dict, None) or fields.take("rope_scaling", dict, {}))
    for name in LEGACY:
        fields.taken.add(name)
    inner = Fields(given, f"{fields.where}: rope_parameters")
    theta = fields.take("rope_theta", float, default_theta)
    fraction = fields.take("partial_rotary_factor", float, 1.0)
    kind = inner.take("rope_type", str, "default", also=("type",))
    context = fields.take("max_position_embeddings", int, 0)
    scaling: Scaling | None
    if kind == "default":
        scaling = None
    elif kind == "linear":
        scaling = Interpolated(factor=inner.take("factor", float))
    elif kind == "llama3":
        scaling = Llama3(
            factor=inner.take("factor", float),
            low=inner.take("low_freq_factor", float),
            high=inner.take("high_freq_factor", float),
            original_context=_original(fields, inner, context),
        )
    elif kind == "yarn":
        scaling = _read_yarn(fields, inner, context)
    elif kind == "longrope":
        scaling = _read_longrope(fields, inner, context)
    else:
        known = "default, linear, llama3, yarn, longrope"
        raise inner.error("rope_type", f"{kind!r} cannot be expressed here; known: {known}")
    return Rotary(
        base=inner.take("rope_theta", float, theta),
        fraction=inner.take("partial_rotary_factor", float, fraction),
        style=style,
        scaling=scaling,
    )


def _original(fields: Fields, inner: Fields, context: int) -> int:
    outer = fields.take("original_max_position_embeddings", int, None)
    return inner.take("original_max_position_embeddings", int, context) if outer is None else outer


def _read_yarn(fields: Fields, inner: Fields, context: int) -> YaRN:
    original = _original(fields, inner, context)
    factor = inner.take("factor", float, None)
    factor = context / original if factor is None else factor
    return YaRN(
        factor=factor,
        original_context=original,
        beta_fast=inner.take("beta_fast", float, 32.0) or 32.0,
        beta_slow=inner.take("beta_slow", float, 1.0) or 1.0,
        attention_factor=inner.take("attention_factor", float, None),
        mscale=inner.take("mscale", float, None),
        mscale_all_dim=inner.take("mscale_all_dim", float, None),
        as_released=True,
        truncate=inner.take("truncate", bool, True),
    )


def _read_longrope(fields: Fields, inner: Fields, context: int) -> LongRoPE:
    """The factors on queries and keys are Phi-3.5-MoE's short_mscale and long_mscale, else attention_factor, else what
    follows from the stretch s of a context L: sqrt(1 + ln s / ln L)."""
    original = _original(fields, inner, context)
    stretch = inner.take("factor", float, context / original)
    scale = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))
    scale = inner.take("attention_factor", float, scale)
    return LongRoPE(
        short_factor=_floats(inner, "short_factor"),
        long_factor=_floats(inner, "long_factor"),
        original_context=original,
        short_scale=inner.take("short_mscale", float, scale),
        long_scale=inner.take("long_mscale", float, scale),
    )


def _floats(inner: Fields, name: str) -> tuple[float, ...]:
    values = inner.take(name, list)
    if not all(type(v) in (int, float) for v in values):
        raise inner.error(name, f"expected a list of numbers, found {values!r}")
    return tuple(map(float, values))


def write_rotary(positions: Positions | None, *, style: str = "half") -> dict[str, Any]:
    """`{"rope_parameters": ...}`. Raises `UserError` for positions that no published layout holds."""
    if not isinstance(positions, Rotary):
        raise UserError(f"positions: {type(positions).__name__} has no place in this family; it needs Rotary")
    if positions.style != style:
        raise UserError(f"positions.style: this family's is {style!r}, the model's is {positions.style!r}")
    out: dict[str, Any] = {"rope_theta": positions.base, "rope_type": "default"}
    if positions.fraction != 1.0:
        out["partial_rotary_factor"] = positions.fraction
    match positions.scaling:
        case None:
            pass
        case Interpolated(factor=factor):
            out |= {"rope_type": "linear", "factor": factor}
        case Llama3() as s:
            out |= {"rope_type": "llama3", "factor": s.factor, "low_freq_factor": s.low, "high_freq_factor": s.high}
            out["original_max_position_embeddings"] = s.original_context
        case YaRN(as_released=True) as s:
            out |= {"rope_type": "yarn", "factor": s.factor, "beta_fast": s.beta_fast, "beta_slow": s.beta_slow}
            out["original_max_position_embeddings"] = s.original_context
            optional = ("attention_factor", "mscale", "mscale_all_dim")
            out |= {name: value for name in optional if (value := getattr(s, name)) is not None}
            if not s.truncate:
                out["truncate"] = False
        case LongRoPE(use="auto") as s:
            out |= {"rope_type": "longrope", "short_mscale": s.short_scale, "long_mscale": s.long_scale}
            out |= {"short_factor": list(s.short_factor), "long_factor": list(s.long_factor)}
            out["original_max_position_embeddings"] = s.original_context
            if s.short_scale == s.long_scale:
                out["attention_factor"] = s.short_scale
        case YaRN():
            raise UserError("positions.scaling.as_released: checkpoints hold YaRN as released only, set it to True")
        case other:
            raise UserError(f"positions.scaling: {type(other).__name__} has no place in a config.json")
    return {"rope_parameters": out}
