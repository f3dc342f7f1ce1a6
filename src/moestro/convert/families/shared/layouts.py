"""Rules that many families share: names of Llama's kind on their side."""

from __future__ import annotations

from ...checkpoint.rules import Copy, Fuse, Ignored, Stack, StackFuse, Table

__all__ = ["ATTENTION", "DENSE", "EDGES", "NORMS", "experts", "shared_expert"]

_OURS, _THEIRS = "layers.{layer}.", "model.layers.{layer}."

EDGES: Table = (
    Copy("embed.weight", "model.embed_tokens.weight"),
    Copy("norm.weight", "model.norm.weight"),
    Copy("norm.bias", "model.norm.bias"),
    Copy("head.weight", "lm_head.weight"),
    Copy("head.bias", "lm_head.bias"),
    Ignored("lm_head.weight", "the head is tied to the embedding", equals="model.embed_tokens.weight"),
    Ignored("model.layers.{layer}.self_attn.rotary_emb.inv_freq", "follows from the config"),
)
"""Embedding, last norm, head."""

NORMS: Table = tuple(
    Copy(f"{_OURS}{ours}.{part}", f"{_THEIRS}{theirs}.{part}")
    for ours, theirs in (("mixer_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"))
    for part in ("weight", "bias")
)
"""The two norms of a block."""

ATTENTION: Table = tuple(
    Copy(f"{_OURS}mixer.{ours}.{part}", f"{_THEIRS}self_attn.{theirs}.{part}")
    for ours, theirs, parts in (
        ("q", "q_proj", ("weight", "bias")),
        ("k", "k_proj", ("weight", "bias")),
        ("v", "v_proj", ("weight", "bias")),
        ("o", "o_proj", ("weight", "bias")),
        ("q_norm", "q_norm", ("weight",)),
        ("k_norm", "k_norm", ("weight",)),
    )
    for part in parts
)
"""Attention with or without biases and norms."""

DENSE: Table = (
    Fuse(_OURS + "ffn.gate_up", (_THEIRS + "mlp.gate_proj.weight", _THEIRS + "mlp.up_proj.weight")),
    Copy(_OURS + "ffn.down", _THEIRS + "mlp.down_proj.weight"),
)
"""A dense gated FFN."""


def experts(
    block: str = "mlp", *, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj", router: str = "gate"
) -> Table:
    """Routed gated experts that lie apart, one module each, and a linear router."""
    one = f"{_THEIRS}{block}.experts.{{expert}}."
    return (
        Copy(_OURS + "ffn.router.score.weight", f"{_THEIRS}{block}.{router}.weight"),
        StackFuse(_OURS + "ffn.experts.gate_up", (f"{one}{gate}.weight", f"{one}{up}.weight")),
        Stack(_OURS + "ffn.experts.down", f"{one}{down}.weight"),
    )


def shared_expert(block: str = "mlp.shared_experts", gate: str | None = None) -> Table:
    """The expert that all tokens meet, a gated MLP, with the name of its sigmoid gate where it has one."""
    rules: Table = (
        StackFuse(
            _OURS + "ffn.shared.gate_up", (f"{_THEIRS}{block}.gate_proj.weight", f"{_THEIRS}{block}.up_proj.weight")
        ),
        Stack(_OURS + "ffn.shared.down", f"{_THEIRS}{block}.down_proj.weight"),
    )
    return rules if gate is None else (*rules, Copy(_OURS + "ffn.shared_gate.weight", f"{_THEIRS}{gate}.weight"))
