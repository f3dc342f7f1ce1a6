"""A stack of blocks that can be run in slices: what decoders and encoders are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.carry import Carry
from ..core.draws import fold
from ..core.errors import UserError
from ..core.params import ParamInfo
from ..core.pytree import changed
from ..core.signals import Signals
from ..core.trail import Trail
from ..nn.cache import KVCache
from ..nn.cross import Memory
from ..nn.dropout import dropout
from ..nn.init import initialise
from ..ops.choice import checkpoint
from .config import Stack as StackConfig

__all__ = ["Embedding", "Stack", "TiedEmbedding", "dropped", "length_of", "places"]


class Embedding(nn.Embedding):
    """Token embeddings, times a factor."""

    def __init__(self, vocab_size: int, dim: int, scale: float | None) -> None:
        super().__init__(vocab_size, dim)
        self.scale = scale

    def forward(self, tokens: Tensor) -> Tensor:
        h = super().forward(tokens)
        return h if self.scale is None else h * self.scale

    def param_info(self) -> dict[str, ParamInfo]:
        return {"weight": ParamInfo(role="embedding", matrix_axes=(0, 1), decay=False)}


def _embedding(config: StackConfig) -> nn.Module:
    sizes = config.vocab_size, config.dim, config.embedding_scale
    return Embedding(*sizes) if config.embedding is None else config.embedding.build(*sizes)


class TiedEmbedding(nn.Module):
    """Token embeddings from another module's table. It has no parameters, so none is saved twice."""

    def __init__(self, embedding: nn.Embedding, scale: float | None) -> None:
        super().__init__()
        self._embedding = [embedding]  # a list hides it from the module tree
        self.scale = scale

    @property
    def weight(self) -> Tensor:
        return self._embedding[0].weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = nn.functional.embedding(tokens, self.weight)
        return h if self.scale is None else h * self.scale


def length_of(state: Any) -> int:
    """How many tokens a mixer has seen."""
    return state.length if isinstance(state, KVCache) else 0


def places(signals: Signals, x: Tensor, state: Any) -> dict[str, Tensor]:
    """`position`, `segment` and `unit_id` of the units where the signals lack them. unit_id: row * 2^32 + position, the
    same in whole and in cached passes."""
    B, S, _ = x.shape
    changes: dict[str, Tensor] = {}
    position = signals.position
    if position is None:
        start = length_of(state)
        position = torch.arange(start, start + S, device=x.device).expand(B, S).reshape(-1)
        changes["position"] = position
    if signals.segment is None or signals.unit_id is None:
        row = torch.arange(B, device=x.device)[:, None].expand(B, S).reshape(-1)
        if signals.segment is None:
            changes["segment"] = row
        if signals.unit_id is None:
            changes["unit_id"] = (row << 32) | position
    return changes


def dropped(x: Tensor, share: float, part: str, signals: Signals, state: Any) -> Tensor:
    """x [B, S, D] after dropout, with draws of its own for every part of a block."""
    unit_id = signals.unit_id
    if unit_id is None:
        unit_id = (places(signals, x, state) if signals.places is None else signals.places)["unit_id"]
    return dropout(x, share, fold(signals.seed, f"dropout.{part}"), unit_id)


class Stack(nn.Module):
    """Embedding, blocks, last norm. `run(embed(tokens))` is `hidden`; `run` can do any slice of the blocks.

    Shapes: tokens [B, S] int64; h [B, S, D]. Carry and trail: paths are those of the modules, such as "layers.3.ffn".
    embed: a module in place of the stack's own table.
    """

    config: StackConfig

    def __init__(self, config: StackConfig, embed: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.embed: Any = _embedding(config) if embed is None else embed
        self.layers = nn.ModuleList(block.build(config.dim) for block in config.resolved())
        self.norm: nn.Module = nn.Identity() if config.ends_normed() else config.norm.build(config.dim)
        self.embed_norm = config.embedding_norm.build(config.dim) if config.embedding_norm else None
        self.positions = config.positions.build(config.dim, config.context) if config.positions else None
        self.relative = config.relative_bias.build(*config.heads()) if config.relative_bias else None

    def initialise(self, seed: int | None = None) -> None:
        """(Re)draw all parameters from the config's seed, or from another."""
        config = self.config
        branches = config.branches() if config.init_depth_scaled else None
        initialise(self, config.seed if seed is None else seed, config.init_std, branches)

    def run(
        self,
        h: Tensor,
        signals: Signals | None = None,
        carry: Carry | None = None,
        start: int = 0,
        stop: int | None = None,
        memory: Memory | None = None,
    ) -> tuple[Tensor, Carry, Trail]:
        """Blocks `start` to `stop` (exclusive; None = to the end). The final norm belongs to the end: a run through the
        last block returns what `head` takes. Positions, norm and dropout of embeddings belong to the first block.
        """
        signals = Signals() if signals is None else signals
        carry = Carry() if carry is None else carry
        last = self.config.num_layers
        stop = last if stop is None else stop
        if not 0 <= start <= stop <= last:
            raise UserError(f"run: blocks {start} to {stop} of a model with {last}")
        trail = Trail()
        save = self.config.checkpoint and self.training and torch.is_grad_enabled()
        told: dict[int, Signals] = {}  # by how much the mixer has seen: the same for all layers of one kind
        names = [f"layers.{i}" for i in range(start, stop)]
        parts, after = carry.apart(names), carry
        more: dict[str, Any] = {}
        if self.positions is not None or self.relative is not None:
            before = length_of(parts[0].get("mixer")) if parts else 0
            if self.positions is not None and start == 0 and parts:
                h = self.positions(h, signals.position, before)
            if self.relative is not None:
                more["bias"] = self.relative(h.shape[1], before + h.shape[1])
        if start == 0 and parts:
            if self.embed_norm is not None:
                h = self.embed_norm(h)
            if self.config.dropout and self.training:
                h = dropped(h, self.config.dropout, "embed", signals, parts[0].get("mixer"))
        for i, (name, layer) in enumerate(zip(names, list(self.layers)[start:stop], strict=True)):
            inner, seen = changed(after, own=parts[i]), signals
            draws = self.training and getattr(layer, "draws", False)
            if (draws or getattr(layer, "routed", False)) and signals.places is None:
                state = inner.own.get("mixer")
                length = length_of(state)
                if length not in told:
                    told[length] = changed(signals, places=places(signals, h, state))
                seen = told[length]
            if memory is not None and hasattr(layer, "cross"):
                more["memory"] = memory
            else:
                more.pop("memory", None)
            if save:
                h, after, left = checkpoint(layer, h, seen.at(name), inner, **more)
            else:
                h, after, left = layer(h, seen.at(name), inner, **more)
            parts[i] = after.own
            trail = trail | left.under(name)
        return self.norm(h) if stop == last else h, carry.together(names, parts, after), trail

    def hidden(
        self,
        tokens: Tensor,
        signals: Signals | None = None,
        carry: Carry | None = None,
        memory: Memory | None = None,
        added: Tensor | None = None,
    ) -> tuple[Tensor, Carry, Trail]:
        """What a head takes, [B, S, D]. added: [B, S, D], goes onto the embeddings. Raises `UserError` for tokens that
        are no [B, S] or more than the context."""
        what = type(self).__name__.lower()
        if tokens.ndim != 2:
            raise UserError(f"the {what} takes tokens [B, S], not {list(tokens.shape)}")
        if tokens.shape[1] > self.config.context:
            raise UserError(f"{tokens.shape[1]} tokens do not fit the model's context of {self.config.context}")
        signals = Signals() if signals is None else signals
        if signals.token is None:
            signals = changed(signals, token=tokens.reshape(-1))
        h = self.embed(tokens)
        return self.run(h if added is None else h + added, signals, carry, memory=memory)

    def extra_backward_flops(self, seq_len: int) -> int:
        """Scores with a bias that is learned go by the plain path, which keeps them and computes none again."""
        if self.relative is None:
            return 0
        mixers = [layer.mixer for layer in self.layers]
        return -sum(m.extra_backward_flops(seq_len) for m in mixers)  # type: ignore[union-attr, operator]
