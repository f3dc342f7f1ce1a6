"""Encoders of ModernBERT's kind: fields of config.json, rules, and a view without what stands on top."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ....core.errors import UserError
from ....models.config import Block, Encoder
from ....moe.config import MoELayer
from ....nn.config import FFN, Attention, FeedForward, LayerNorm, NoNorm, Rotary
from ...checkpoint.boxes import read_box
from ...checkpoint.fields import Fields
from ...checkpoint.rules import Box, Copy, Rule, Split, Table
from ...checkpoint.tensors import Entry, Tensors
from .parts import ACTIVATIONS, activation_field, attention_of, num_layers, one

__all__ = ["Bare", "bert_rules", "read_encoder", "write_encoder"]

_FULL, _SLIDING = "full_attention", "sliding_attention"
_THETA = {_FULL: ("global_rope_theta", 160_000.0), _SLIDING: ("local_rope_theta", 10_000.0)}


def read_encoder(fields: Fields, ffn: Callable[[FeedForward], FFN | MoELayer] | None = None) -> Encoder:
    """The encoder; ffn: what stands in place of its feed-forward layers. A window of n tokens in all is n // 2 on each
    side. The first block has no norm before its attention, the embedding's stands right there."""
    fields.only("mlp_bias", False)
    layers = num_layers(fields)
    norm = LayerNorm(eps=fields.take("norm_eps", float, 1e-5), bias=fields.take("norm_bias", bool, False))
    every = fields.take("global_attn_every_n_layers", int, 3)
    kinds = fields.strings("layer_types") or [_SLIDING if i % max(1, every) else _FULL for i in range(layers)]
    if len(kinds) != layers or not {*kinds} <= {_FULL, _SLIDING}:
        raise fields.error("layer_types", f"{kinds!r}: needs {_FULL} or {_SLIDING} for each of {layers} layers")
    attention = Attention(
        num_heads=fields.take("num_attention_heads", int),
        bias="all" if fields.take("attention_bias", bool, False) else "none",
        causal=False,
    )
    width = fields.take("local_attention", int, 128) // 2 + 1
    rotary = {kind: Rotary(base=_theta(fields, kind)) for kind in _THETA}
    dense = FeedForward(
        width=fields.take("intermediate_size", int),
        activation=fields.choice("hidden_activation", ACTIVATIONS, "gelu"),
    )
    blocks = tuple(
        Block(
            mixer=attention.replace(window=width if kind == _SLIDING else None, positions=rotary[kind]),
            ffn=dense if ffn is None else ffn(dense),
            norm=norm,
            mixer_norm=None if i else NoNorm(),
        )
        for i, kind in enumerate(kinds)
    )
    return Encoder(
        vocab_size=fields.take("vocab_size", int),
        dim=fields.take("hidden_size", int),
        num_layers=layers,
        blocks=blocks,
        norm=norm,
        embedding_norm=norm,
        context=fields.take("max_position_embeddings", int),
    )


def _theta(fields: Fields, kind: str) -> float:
    """The base of the rotary positions of layers of a kind, from `rope_parameters` or the older field."""
    older, default = _THETA[kind]
    base = fields.take(older, float, default)
    given = (fields.take("rope_parameters", dict, None) or {}).get(kind)
    if given is None:
        return base
    inner = Fields(given, f"{fields.where}: rope_parameters.{kind}")
    inner.only("rope_type", "default")
    return inner.take("rope_theta", float, base)


def write_encoder(config: Encoder) -> dict[str, Any]:
    """The fields of `read_encoder`, without those of routed layers but their width and activation."""
    blocks = config.resolved()
    mixers = [attention_of(b) for b in blocks]
    norm = config.norm
    if not isinstance(norm, LayerNorm):
        raise UserError(f"norm: {type(norm).__name__} has no place in this family; it needs LayerNorm")
    mlps: list[Any] = [b.ffn.experts if isinstance(b.ffn, MoELayer) else b.ffn for b in blocks]
    kinds = [_FULL if m.window is None else _SLIDING for m in mixers]
    windows = [m.window for m in mixers if m.window is not None]
    rope: dict[str, Any] = {}
    for kind in _THETA:
        bases = [
            m.positions.base if isinstance(m.positions, Rotary) else None for m, k in zip(mixers, kinds) if k == kind
        ]
        if None in bases:
            raise UserError("positions: this family needs Rotary in every block")
        rope[kind] = {"rope_type": "default", "rope_theta": one(bases, "positions.base") if bases else _THETA[kind][1]}
    out: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": one([m.num_heads for m in mixers], "num_heads"),
        "intermediate_size": one([getattr(m, "width", None) for m in mlps], "width"),
        "hidden_activation": activation_field(one([getattr(m, "activation", None) for m in mlps], "activation")),
        "attention_bias": one([m.bias for m in mixers], "bias") == "all",
        "norm_eps": norm.eps,
        "norm_bias": norm.bias,
        "layer_types": kinds,
        "rope_parameters": rope,
        "max_position_embeddings": config.context,
    }
    return out | ({"local_attention": 2 * (one(windows, "window") - 1)} if windows else {})


def bert_rules(ours: str, theirs: str) -> Table:
    """Embedding, norms, attention and dense feed-forward layers, behind these prefixes."""
    at, there = ours + "layers.{layer}.", theirs + "layers.{layer}."
    rules: list[Rule] = [Copy(f"{ours}embed.weight", f"{theirs}embeddings.tok_embeddings.weight")]
    for part in ("weight", "bias"):
        rules += [
            Copy(f"{ours}embed_norm.{part}", f"{theirs}embeddings.norm.{part}"),
            Copy(f"{ours}norm.{part}", f"{theirs}final_norm.{part}"),
            Copy(f"{at}mixer_norm.{part}", f"{there}attn_norm.{part}"),
            Copy(f"{at}ffn_norm.{part}", f"{there}mlp_norm.{part}"),
            Split(tuple(f"{at}mixer.{n}.{part}" for n in "qkv"), f"{there}attn.Wqkv.{part}"),
            Copy(f"{at}mixer.o.{part}", f"{there}attn.Wo.{part}"),
        ]
    return (*rules, Copy(f"{at}ffn.gate_up", f"{there}mlp.Wi.weight"), Copy(f"{at}ffn.down", f"{there}mlp.Wo.weight"))


class Bare:
    """Tensors behind a prefix, under their names without it; those behind `aside` belong to a head and are left out.
    What is neither keeps its name, and is found to be left over."""

    def __init__(self, source: Tensors, prefix: str, aside: tuple[str, ...] = ()) -> None:
        self._source = source
        kept = [n for n in source.entries() if not n.startswith(aside)]
        self._names = {n.removeprefix(prefix): n for n in kept}

    def entries(self) -> Mapping[str, Entry]:
        own = self._source.entries()
        return {ours: own[theirs] for ours, theirs in self._names.items()}

    def read(self, name: str) -> Tensor:
        return self._source.read(self._names[name])

    def read_box(self, name: str, box: Box) -> Tensor:
        return read_box(self._source, self._names[name], box)
