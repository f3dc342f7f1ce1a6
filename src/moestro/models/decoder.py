"""The decoder: a causal language model of dense and routed blocks, in slices that can be run apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.carry import Carry
from ..core.errors import UserError
from ..core.pytree import changed
from ..core.signals import Signals
from ..core.trail import Trail
from ..moe.config import MoELayer
from ..nn.cross import Memory
from ..ops.cross_entropy import cross_entropy
from ..ops.few import linear
from ..ops.pages import large_pages
from ..routers.mix import AttentionMixStep
from ..routers.steps import MixStep
from .config import Block as BlockConfig
from .config import Decoder as DecoderConfig
from .stack import Embedding, Stack, dropped, places

__all__ = ["Block", "Decoder", "Embedding", "Head", "ParallelBlock"]


class Head(nn.Linear):
    """Hidden states to logits."""

    role = "head"

    def __init__(self, vocab_size: int, dim: int, bias: bool = False) -> None:
        super().__init__(dim, vocab_size, bias=bias)
        large_pages(self.weight)

    def forward(self, h: Tensor) -> Tensor:
        return linear(h, self.weight, self.bias)


class TiedHead(nn.Module):
    """Hidden states to logits with the embedding's matrix, which is not a parameter of it, so none is saved twice.
    The bias, if any, is its own."""

    role = "head"

    def __init__(self, embedding: nn.Embedding, bias: bool = False) -> None:
        super().__init__()
        self._embedding = [embedding]  # a list hides it from the module tree
        self.bias = nn.Parameter(torch.zeros(embedding.num_embeddings)) if bias else None

    @property
    def weight(self) -> Tensor:
        return self._embedding[0].weight

    def forward(self, h: Tensor) -> Tensor:
        return linear(h, self.weight, self.bias)


class Block(nn.Module):
    """Pre-norm block: `(h [B, S, D], signals, carry) -> (h, carry, trail)`. bias: for the mixer, on its scores.

    The mixer's state travels in `carry.own` under "mixer"; none there = none is kept. A routed layer sees the block's
    signals, completed with `position`, `segment`, `unit_id` and `attend` where they are missing (the first three from
    `signals.places`, where somebody has computed them already).
    """

    def __init__(self, config: BlockConfig, dim: int) -> None:
        super().__init__()
        self.norms(config, dim)
        self.mixer = config.mixer.build(dim)
        self.ffn = config.ffn.build(dim)
        self.residual_scale, self.dropout = config.residual_scale, config.dropout
        self.routed_ffn = isinstance(config.ffn, MoELayer)
        self.threads = bool(getattr(self.mixer, "threads", False))
        self.routed = self.routed_ffn or self.threads
        self.draws = bool(config.dropout or getattr(config.mixer, "dropout", 0))

    def norms(self, config: BlockConfig, dim: int) -> None:
        """Build the norms."""
        self.mixer_norm = (config.norm if config.mixer_norm is None else config.mixer_norm).build(dim)
        self.ffn_norm = config.norm.build(dim)

    def forward(
        self, h: Tensor, signals: Signals, carry: Carry, bias: Tensor | None = None
    ) -> tuple[Tensor, Carry, Trail]:
        state = carry.own.get("mixer")
        y, attend, carry, trail = self.mix(self.mixer_norm(h), signals, carry, state, bias)
        h = self.add(h, y, "mixer", signals, state)
        y, carry, left = self.feed(self.ffn_norm(h), signals, carry, state, attend)
        return self.add(h, y, "ffn", signals, state), carry, trail | left

    def add(self, h: Tensor, y: Tensor, part: str, signals: Signals, state: Any) -> Tensor:
        """h + residual_scale * y, in training with entries of y dropped. part: whose output y is."""
        if self.dropout and self.training:
            y = dropped(y, self.dropout, part, signals, state)
        return h + y if self.residual_scale == 1.0 else h + y * self.residual_scale

    def mix(
        self, x: Tensor, signals: Signals, carry: Carry, state: Any, bias: Tensor | None = None
    ) -> tuple[Tensor, Any, Carry, Trail]:
        """The mixer's output, its attention as an operator (or None), and the carry with its state."""
        mixer, attend, trail = self.mixer, None, Trail()
        more: dict[str, Any] = {} if bias is None else {"bias": bias}
        if self.threads:
            where = places(signals, x, state) if signals.places is None else signals.places
            inner = carry.at("mixer")
            inner = changed(inner, own={k: v for k, v in inner.own.items() if k})  # without the state
            y, after, inner, trail = mixer(x, changed(signals.at("mixer"), **where, places=None), state, inner)
            carry = carry.back("mixer", inner)
        elif self.routed_ffn and getattr(mixer, "offers_operator", False):
            y, after, attend = mixer(x, signals, state, operator=True, **more)
        else:
            y, after = mixer(x, signals, state, **more)
        return y, attend, carry if after is None else carry.put("mixer", after), trail.under("mixer")

    def feed(self, x: Tensor, signals: Signals, carry: Carry, state: Any, attend: Any) -> tuple[Tensor, Carry, Trail]:
        """The feed-forward layer's output. state: the mixer's before this pass, which tells how much was seen."""
        if not self.routed_ffn:
            y, _, trail = self.ffn(x, signals)
            return y, carry, trail
        where = places(signals, x, state) if signals.places is None else signals.places
        attend = signals.attend if attend is None else attend
        seen = changed(signals.at("ffn"), **where, attend=attend, places=None)
        y, inner, trail = self.ffn(x, seen, carry.at("ffn"))
        return y, carry.back("ffn", inner), trail.under("ffn")

    def extra_flops(self, seq_len: int) -> int:
        """Of a router that averages over the attention: the whole kernel again, not only its last product, and the
        output map of every head where it asks for that."""
        mix, calls = self._looks()
        if not calls:
            return 0
        parts = 2 * self.mixer.o.weight.numel() if mix.posterior else 0
        return calls * self.mixer.extra_flops(seq_len) - mix.extra_flops(seq_len) + parts

    def extra_backward_flops(self, seq_len: int) -> int:
        _, calls = self._looks()
        return calls * self.mixer.extra_backward_flops(seq_len) if calls else 0

    def _looks(self) -> tuple[Any, int]:
        """The router's mix step, and how often it calls the mixer's attention: once per head's width of ids."""
        mix = getattr(getattr(self.ffn, "router", None), "mix", None)
        if not isinstance(mix, AttentionMixStep) or not getattr(self.mixer, "offers_operator", False):
            return mix, 0
        return mix, -(-mix.num_ids // self.mixer.head_dim)


class ParallelBlock(Block):
    """h + mixer(norm(h)) + ffn(norm(h)), with one norm: both read the same input (GPT-J, PaLM; 05, BAM)."""

    def norms(self, config: BlockConfig, dim: int) -> None:
        self.norm = config.norm.build(dim)

    def forward(
        self, h: Tensor, signals: Signals, carry: Carry, bias: Tensor | None = None
    ) -> tuple[Tensor, Carry, Trail]:
        state = carry.own.get("mixer")
        x = self.norm(h)
        y, attend, carry, trail = self.mix(x, signals, carry, state, bias)
        z, carry, left = self.feed(x, signals, carry, state, attend)
        h = self.add(h, y, "mixer", signals, state)
        return self.add(h, z, "ffn", signals, state), carry, trail | left


class Decoder(Stack):
    """A causal language model. `head(run(embed(tokens)))` is `forward`; `run` can do any slice of the blocks.

    Shapes: tokens [B, S] int64 -> logits [B, S, V]; h [B, S, D].
    Carry and trail: paths are those of the modules, such as "layers.3.ffn". Passes that thread a carry made by
    `new_cache` continue each other (cached decoding); without one nothing is kept.
    memory: what blocks with cross-attention look at (models/encoder_decoder.py).
    """

    config: DecoderConfig

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        bias = config.head_bias
        self.head = TiedHead(self.embed, bias) if config.tied else Head(config.vocab_size, config.dim, bias)
        self.crosses = any(hasattr(layer, "cross") for layer in self.layers)
        if not config.allow_noncausal:
            _refuse_noncausal(self)
        if not self.embed.weight.is_meta:
            self.initialise()

    def run(
        self,
        h: Tensor,
        signals: Signals | None = None,
        carry: Carry | None = None,
        start: int = 0,
        stop: int | None = None,
        memory: Memory | None = None,
    ) -> tuple[Tensor, Carry, Trail]:
        if memory is not None and not self.crosses:
            raise UserError("a memory is of no use to this decoder: no block has cross-attention; set Decoder.cross")
        h, carry, trail = super().run(h, signals, carry, start, stop, memory)
        if self.config.logits_scaling != 1.0 and stop in (None, self.config.num_layers):
            h = h / self.config.logits_scaling  # here and not on the logits: so every reader of `head` has it
        return h, carry, trail

    def forward(
        self,
        tokens: Tensor,
        signals: Signals | None = None,
        carry: Carry | None = None,
        memory: Memory | None = None,
    ) -> tuple[Tensor, Carry, Trail]:
        h, carry, trail = self.hidden(tokens, signals, carry, memory)
        return self.head(h), carry, trail

    def loss(
        self, tokens: Tensor, targets: Tensor, signals: Signals | None = None, carry: Carry | None = None
    ) -> tuple[Tensor, Tensor, Carry, Trail]:
        """(sum of nats [], number of targets [] int64, carry, trail), without ever holding all logits.

        Shapes: tokens, targets [B, S]; targets of -1 and padding (`signals.valid`) do not count.
        """
        h, carry, trail = self.hidden(tokens, signals, carry)
        total, count = self.nats(h, targets, None if signals is None else signals.valid)
        return total, count, carry, trail

    def nats(self, h: Tensor, targets: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(sum of nats [], number of targets []) of what `head` would say to h [B, S, D]; see `loss`."""
        flat, head = h.flatten(0, 1), self.head
        return cross_entropy(flat, head.weight, targets.reshape(-1), valid, bias=head.bias)

    def new_cache(self, capacity: int | None = None) -> Carry:
        """A carry with an empty state for each mixer and mix step, for at most `capacity` tokens (default: context)."""
        capacity = self.config.context if capacity is None else capacity
        own: dict[str, Any] = {}
        for i, layer in enumerate(self.layers):
            own[f"layers.{i}.mixer"] = layer.mixer.new_state(capacity)  # type: ignore[union-attr, operator]
            if hasattr(layer, "cross"):
                own[f"layers.{i}.cross"] = layer.cross.new_state()  # type: ignore[union-attr, operator]
            for path, part in layer.named_modules():
                if isinstance(part, MixStep) and (state := part.new_state(capacity)) is not None:
                    own[f"layers.{i}.{path}"] = state
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
