"""The decoder: a causal language model of dense and routed blocks, in slices that can be run apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.carry import Carry
from ..core.errors import UserError
from ..core.params import ParamInfo
from ..core.pytree import changed
from ..core.signals import Signals
from ..core.trail import Trail
from ..moe.config import MoELayer
from ..nn.cache import KVCache
from ..nn.init import initialise
from ..ops.choice import checkpoint
from ..ops.cross_entropy import cross_entropy
from ..ops.few import linear
from ..ops.pages import large_pages
from .config import Block as BlockConfig
from .config import Decoder as DecoderConfig

__all__ = ["Block", "Decoder", "Embedding", "Head"]


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


class Head(nn.Linear):
    """Hidden states to logits."""

    role = "head"

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__(dim, vocab_size, bias=False)
        large_pages(self.weight)

    def forward(self, h: Tensor) -> Tensor:
        return linear(h, self.weight)


class TiedHead(nn.Module):
    """Hidden states to logits with the embedding's matrix. It has no parameters, so none is saved twice."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self._embedding = [embedding]  # a list hides it from the module tree

    @property
    def weight(self) -> Tensor:
        return self._embedding[0].weight

    def forward(self, h: Tensor) -> Tensor:
        return linear(h, self.weight)


class Block(nn.Module):
    """Pre-norm block: `(h [B, S, D], signals, carry) -> (h, carry, trail)`.

    The mixer's state travels in `carry.own` under "mixer"; none there = none is kept. A routed layer sees the block's
    signals, completed with `position`, `segment`, `unit_id` and `attend` where they are missing (the first three from
    `signals.places`, where somebody has computed them already).
    """

    def __init__(self, config: BlockConfig, dim: int) -> None:
        super().__init__()
        self.mixer_norm = config.norm.build(dim)
        self.mixer = config.mixer.build(dim)
        self.ffn_norm = config.norm.build(dim)
        self.ffn = config.ffn.build(dim)
        self.routed = isinstance(config.ffn, MoELayer)

    def forward(self, h: Tensor, signals: Signals, carry: Carry) -> tuple[Tensor, Carry, Trail]:
        state, mixer = carry.own.get("mixer"), self.mixer
        x = self.mixer_norm(h)
        attend = None
        if self.routed and getattr(mixer, "offers_operator", False):
            y, after, attend = mixer(x, signals, state, operator=True)
        else:
            y, after = mixer(x, signals, state)
        h = h + y
        if after is not None:
            carry = carry.put("mixer", after)
        x = self.ffn_norm(h)
        if not self.routed:
            y, _, trail = self.ffn(x)
            return h + y, carry, trail
        places = _places(signals, x, state) if signals.places is None else signals.places
        attend = signals.attend if attend is None else attend
        seen = changed(signals.at("ffn"), **places, attend=attend, places=None)
        y, inner, trail = self.ffn(x, seen, carry.at("ffn"))
        return h + y, carry.back("ffn", inner), trail.under("ffn")


def _length(state: Any) -> int:
    """How many tokens a mixer has seen."""
    return state.length if isinstance(state, KVCache) else 0


def _places(signals: Signals, x: Tensor, state: Any) -> dict[str, Tensor]:
    """`position`, `segment` and `unit_id` of the units where the signals lack them. unit_id: row * 2^32 + position, the
    same in whole and in cached passes."""
    B, S, _ = x.shape
    changes: dict[str, Tensor] = {}
    position = signals.position
    if position is None:
        start = _length(state)
        position = torch.arange(start, start + S, device=x.device).expand(B, S).reshape(-1)
        changes["position"] = position
    if signals.segment is None or signals.unit_id is None:
        row = torch.arange(B, device=x.device)[:, None].expand(B, S).reshape(-1)
        if signals.segment is None:
            changes["segment"] = row
        if signals.unit_id is None:
            changes["unit_id"] = (row << 32) | position
    return changes


class Decoder(nn.Module):
    """A causal language model. `head(run(embed(tokens)))` is `forward`; `run` can do any slice of the blocks.

    Shapes: tokens [B, S] int64 -> logits [B, S, V]; h [B, S, D].
    Carry and trail: paths are those of the modules, such as "layers.3.ffn". Passes that thread a carry made by
    `new_cache` continue each other (cached decoding); without one nothing is kept.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.dim, config.embedding_scale)
        self.layers = nn.ModuleList(block.build(config.dim) for block in config.resolved())
        self.norm = config.norm.build(config.dim)
        self.head = TiedHead(self.embed) if config.tied else Head(config.vocab_size, config.dim)
        if not config.allow_noncausal:
            _refuse_noncausal(self)
        if not self.embed.weight.is_meta:
            self.initialise()

    def initialise(self, seed: int | None = None) -> None:
        """(Re)draw all parameters from the config's seed, or from another."""
        config = self.config
        branches = 2 * config.num_layers if config.init_depth_scaled else None
        initialise(self, config.seed if seed is None else seed, config.init_std, branches)

    def run(
        self,
        h: Tensor,
        signals: Signals | None = None,
        carry: Carry | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> tuple[Tensor, Carry, Trail]:
        """Blocks `start` to `stop` (exclusive; None = to the end). The final norm belongs to the end: a run through the
        last block returns what `head` takes.
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
        for i, (name, layer) in enumerate(zip(names, list(self.layers)[start:stop], strict=True)):
            inner, seen = changed(after, own=parts[i]), signals
            if getattr(layer, "routed", False) and signals.places is None:
                state = inner.own.get("mixer")
                length = _length(state)
                if length not in told:
                    told[length] = changed(signals, places=_places(signals, h, state))
                seen = told[length]
            if save:
                h, after, left = checkpoint(layer, h, seen.at(name), inner)
            else:
                h, after, left = layer(h, seen.at(name), inner)
            parts[i] = after.own
            trail = trail | left.under(name)
        return self.norm(h) if stop == last else h, carry.together(names, parts, after), trail

    def hidden(
        self, tokens: Tensor, signals: Signals | None = None, carry: Carry | None = None
    ) -> tuple[Tensor, Carry, Trail]:
        """What `head` takes, [B, S, D]. Raises `UserError` for tokens that are no [B, S] or more than the context."""
        if tokens.ndim != 2:
            raise UserError(f"the decoder takes tokens [B, S], not {list(tokens.shape)}")
        if tokens.shape[1] > self.config.context:
            raise UserError(f"{tokens.shape[1]} tokens do not fit the model's context of {self.config.context}")
        signals = Signals() if signals is None else signals
        if signals.token is None:
            signals = changed(signals, token=tokens.reshape(-1))
        return self.run(self.embed(tokens), signals, carry)

    def forward(
        self, tokens: Tensor, signals: Signals | None = None, carry: Carry | None = None
    ) -> tuple[Tensor, Carry, Trail]:
        h, carry, trail = self.hidden(tokens, signals, carry)
        return self.head(h), carry, trail

    def loss(
        self, tokens: Tensor, targets: Tensor, signals: Signals | None = None, carry: Carry | None = None
    ) -> tuple[Tensor, Tensor, Carry, Trail]:
        """(sum of nats [], number of targets [] int64, carry, trail), without ever holding all logits.

        Shapes: tokens, targets [B, S]; targets of -1 and padding (`signals.valid`) do not count.
        """
        h, carry, trail = self.hidden(tokens, signals, carry)
        valid = None if signals is None else signals.valid
        total, count = cross_entropy(h.flatten(0, 1), self.head.weight, targets.reshape(-1), valid)
        return total, count, carry, trail

    def new_cache(self, capacity: int | None = None) -> Carry:
        """A carry with an empty state for every mixer, for at most `capacity` tokens (default: the context)."""
        capacity = self.config.context if capacity is None else capacity
        own: dict[str, Any] = {}
        for i, layer in enumerate(self.layers):
            own[f"layers.{i}.mixer"] = layer.mixer.new_state(capacity)  # type: ignore[union-attr, operator]
        return Carry(own=own)

    def extra_flops(self, seq_len: int) -> int:
        return 2 * self.embed.weight.numel() if self.config.tied else 0


def _refuse_noncausal(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if getattr(module, "causal", True) is False and not any(
            getattr(child, "causal", True) is False for child in module.children()
        ):
            kind = type(module).__name__
            raise UserError(
                f"{path}: {kind} is not causal: it lets a token's route depend on later tokens, which a decoder cannot "
                "know when it generates; choose another, or set allow_noncausal=True on the Decoder"
            )
