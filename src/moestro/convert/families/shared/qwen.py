"""Which layers are routed and which have a window, as Qwen's config.json says it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ....models.config import Block
from ....moe.config import MoELayer
from ...checkpoint.fields import Fields
from .parts import attention_of, one

__all__ = ["sparse_layers", "windows", "write_sparse_layers", "write_windows"]


def sparse_layers(fields: Fields, layers: int) -> list[bool]:
    """Which layers are routed, by `mlp_only_layers` and `decoder_sparse_step`."""
    step = fields.take("decoder_sparse_step", int, 1)
    if step < 1:
        raise fields.error("decoder_sparse_step", f"must be at least 1, found {step}")
    dense = set(fields.ints("mlp_only_layers"))
    return [i not in dense and (i + 1) % step == 0 for i in range(layers)]


def write_sparse_layers(blocks: Sequence[Block]) -> dict[str, Any]:
    """The fields of `sparse_layers`."""
    dense = [i for i, block in enumerate(blocks) if not isinstance(block.ffn, MoELayer)]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def windows(fields: Fields, layers: int, sliding: Callable[[int], bool]) -> list[int | None]:
    """The window of each layer, by `use_sliding_window`, `sliding_window` and `layer_types`, or `sliding` where the
    last is absent."""
    used = fields.take("use_sliding_window", bool, False)
    width = fields.take("sliding_window", int, 4096)
    kinds = fields.strings("layer_types")
    if kinds is None:
        kinds = ["sliding_attention" if used and sliding(i) else "full_attention" for i in range(layers)]
    if len(kinds) != layers:
        raise fields.error("layer_types", f"{len(kinds)} entries for {layers} layers")
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise fields.error("layer_types", f"{kind!r} cannot be expressed here")
    if "sliding_attention" in kinds and not used:
        raise fields.error("layer_types", "has sliding_attention where use_sliding_window is false")
    return [width if kind == "sliding_attention" else None for kind in kinds]


def write_windows(blocks: Sequence[Block]) -> dict[str, Any]:
    """The fields of `windows`."""
    found = [attention_of(block).window for block in blocks]
    widths = [w for w in found if w is not None]
    return {
        "use_sliding_window": bool(widths),
        "sliding_window": one(widths, "window") if widths else None,
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in found],
    }
