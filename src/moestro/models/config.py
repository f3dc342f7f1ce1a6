"""Configs of networks."""

from __future__ import annotations

from typing import ClassVar, Literal

from ..core.config import Config, config
from ..core.errors import UserError
from ..moe.config import MoELayer
from ..nn.config import Attention, FeedForward, Mixer, Norm, RMSNorm


@config
class Block(Config):
    """One block: norm, mixer, residual; norm, feed-forward layer (dense or routed), residual. Built with (dim)."""

    builds: ClassVar[str] = "moestro.models.decoder:Block"
    mixer: Mixer = Attention()
    """The sequence mixer."""
    ffn: FeedForward | MoELayer = FeedForward()
    """The feed-forward layer."""
    norm: Norm = RMSNorm()
    """The norms before both."""


@config
class ParallelBlock(Block):
    """One norm, then mixer and feed-forward layer side by side, both added to the residual. Built with (dim)."""

    builds: ClassVar[str] = "moestro.models.decoder:ParallelBlock"


@config
class Stack(Config):
    """Base of networks of pre-norm blocks.

    Either `attention`, `ffn`, `moe`, `layout` and `num_experts` describe the blocks, or `blocks` lists them one by one.
    """

    vocab_size: int = 256
    """Number of tokens."""
    dim: int = 128
    """Model width."""
    num_layers: int = 4
    """Number of blocks."""
    attention: Mixer = Attention()
    """The attention of every block."""
    ffn: FeedForward = FeedForward()
    """The feed-forward layer of dense blocks."""
    moe: MoELayer | None = None
    """The routed layer of MoE blocks; None = a dense model."""
    layout: tuple[Literal["dense", "moe"], ...] | None = None
    """Kind of each block; None = all "moe" where `moe` is given, else all "dense"."""
    num_experts: tuple[int, ...] | None = None
    """Experts of each MoE block, in order; None = `moe.num_experts` in all."""
    blocks: tuple[Block, ...] | None = None
    """Every block in full; replaces attention, ffn, moe, layout and num_experts."""
    norm: Norm = RMSNorm()
    """The norms of the blocks and the last one."""
    embedding_scale: float | None = None
    """Factor on embeddings (Gemma: sqrt(dim)); None = 1."""
    context: int = 256
    """The most tokens of a sequence."""
    checkpoint: bool = False
    """Recompute every block in the backward pass; routing decisions are kept."""
    init_std: float | None = 0.02
    """Standard deviation of initial matrices; null = 1 / sqrt(inputs) for each, and 1 for embeddings."""
    init_depth_scaled: bool = True
    """Divide it by sqrt(2 num_layers) for matrices that write into the residual stream (GPT-2)."""
    seed: int = 0
    """Seed of the initial values."""

    def __post_init__(self) -> None:
        self.at_least(1, "vocab_size", "dim", "num_layers", "context")
        self.resolved()

    def branches(self) -> int:
        """How many times a block adds to the residual stream, over all blocks."""
        return 2 * self.num_layers

    def kinds(self) -> tuple[Literal["dense", "moe"], ...]:
        """The kind of each block."""
        if self.blocks is not None:
            return tuple("moe" if isinstance(b.ffn, MoELayer) else "dense" for b in self.blocks)
        if self.layout is not None:
            return self.layout
        return ("dense" if self.moe is None else "moe",) * self.num_layers

    def resolved(self) -> tuple[Block, ...]:
        """Every block in full. Raises `UserError` where the fields contradict each other."""
        name = type(self).__name__
        if self.blocks is not None:
            if len(self.blocks) != self.num_layers:
                raise UserError(f"{name}.blocks: {len(self.blocks)} blocks for num_layers {self.num_layers}")
            if self.layout is not None or self.num_experts is not None:
                raise UserError(f"{name}.blocks: already says what layout and num_experts would; leave those unset")
            return self.blocks
        kinds = self.kinds()
        if len(kinds) != self.num_layers:
            raise UserError(f"{name}.layout: {len(kinds)} entries for num_layers {self.num_layers}")
        routed = kinds.count("moe")
        if routed and self.moe is None:
            raise UserError(f'{name}.layout: has "moe" blocks, but moe is None; give a MoELayer')
        if self.num_experts is not None and len(self.num_experts) != routed:
            raise UserError(f"{name}.num_experts: {len(self.num_experts)} entries for {routed} MoE blocks")
        counts = iter(self.num_experts or ())
        blocks: list[Block] = []
        for kind in kinds:
            ffn: FeedForward | MoELayer = self.ffn
            if kind == "moe" and self.moe is not None:
                ffn = self.moe if self.num_experts is None else self.moe.replace(num_experts=next(counts))
            blocks.append(Block(mixer=self.attention, ffn=ffn, norm=self.norm))
        return tuple(blocks)


@config
class Decoder(Stack):
    """A causal language model of pre-norm blocks.

    Either `attention`, `ffn`, `moe`, `layout` and `num_experts` describe the blocks, or `blocks` lists them one by one.
    """

    builds: ClassVar[str] = "moestro.models.decoder:Decoder"
    tied: bool = False
    """Whether the head uses the embedding's matrix."""
    allow_noncausal: bool = False
    """Accept routers that look at later tokens (generation then differs from training)."""
