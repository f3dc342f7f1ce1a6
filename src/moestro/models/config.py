"""Configs of networks."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from ..core.config import Config, config
from ..core.errors import UserError
from ..moe.config import MoELayer
from ..nn.config import (
    FFN,
    AbsolutePositions,
    Attention,
    CrossAttention,
    FeedForward,
    LayerNorm,
    Mixer,
    Norm,
    RelativeBias,
    RMSNorm,
)
from ..nn.embeddings import FrozenEmbedding
from .heads_config import ClassHead, Head


def _check_dropout(config: Config, share: float) -> None:
    if not 0 <= share < 1:
        raise UserError(f"{type(config).__name__}.dropout: {share} does not lie in [0, 1)")


@config
class Block(Config):
    """One block: norm, mixer, residual; norm, feed-forward layer (dense or routed), residual. Built with (dim)."""

    builds: ClassVar[str] = "moestro.models.decoder:Block"
    mixer: Mixer = Attention()
    """The sequence mixer."""
    ffn: FFN | MoELayer = FeedForward()
    """The feed-forward layer."""
    norm: Norm = RMSNorm()
    """The norms before both."""
    mixer_norm: Norm | None = None
    """The mixer's, where it is another; None = as `norm`."""
    residual_scale: float = 1.0
    """Factor on what mixer and feed-forward layer add to the residual (Granite)."""
    dropout: float = 0.0
    """Share of the entries of what they add that is dropped in training."""

    def __post_init__(self) -> None:
        _check_dropout(self, self.dropout)


@config
class ParallelBlock(Block):
    """One norm, then mixer and feed-forward layer side by side, both added to the residual. Built with (dim)."""

    builds: ClassVar[str] = "moestro.models.decoder:ParallelBlock"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixer_norm is not None:
            raise UserError("ParallelBlock.mixer_norm: both parts read the same norm; leave it None")


@config
class CrossBlock(Block):
    """A block that also looks at a memory, between mixer and feed-forward layer. Built with (dim)."""

    builds: ClassVar[str] = "moestro.models.cross:CrossBlock"
    cross: CrossAttention = CrossAttention()
    """The attention to the memory."""
    source_dim: int | None = None
    """Width of the memory; None = the model's."""


@config
class PostNormBlock(Block):
    """Mixer, residual, norm; feed-forward layer, residual, norm (the first Transformer, BERT). Built with (dim)."""

    builds: ClassVar[str] = "moestro.models.post_norm:PostNormBlock"
    norm: Norm = LayerNorm()
    """The norms after both sums."""


@config
class PostNormCrossBlock(CrossBlock):
    """A post-norm block that also looks at a memory, between mixer and feed-forward layer. Built with (dim)."""

    builds: ClassVar[str] = "moestro.models.post_norm:PostNormCrossBlock"
    norm: Norm = LayerNorm()
    """The norms after all three sums."""


@config
class Stack(Config):
    """Base of networks of blocks.

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
    ffn: FFN = FeedForward()
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
    """The norms of the blocks and the last one, which stacks lack whose last block ends in a norm."""
    norm_order: Literal["pre", "post"] = "pre"
    """Whether blocks norm what their parts read or the sums they make (the first Transformer); `blocks` say it."""
    embedding_norm: Norm | None = None
    """A norm of the embeddings, after positions are added and before dropout (BERT); None = none."""
    embedding: FrozenEmbedding | None = None
    """An embedding that is fixed in advance and never trained; None = a learned table."""
    embedding_scale: float | None = None
    """Factor on embeddings (Gemma: sqrt(dim)); None = 1."""
    residual_scale: float = 1.0
    """Factor on what mixers and feed-forward layers add to the residual (Granite); `blocks` say it themselves."""
    dropout: float = 0.0
    """Share of entries of embeddings, and of what blocks add, that is dropped in training; `blocks` say their own."""
    positions: AbsolutePositions | None = None
    """Positions that are added to embeddings."""
    relative_bias: RelativeBias | None = None
    """A bias on the scores of all blocks' attention, from one table for all (T5)."""
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
        _check_dropout(self, self.dropout)
        self.resolved()
        if self.relative_bias is not None:
            self.heads()

    def heads(self) -> tuple[int, bool]:
        """Query heads of every block's attention and whether it is causal: what a shared bias is built with."""
        kinds = {(b.mixer.num_heads, b.mixer.causal) for b in self.resolved() if isinstance(b.mixer, Attention)}
        if len(kinds) != 1 or not all(isinstance(b.mixer, Attention) for b in self.resolved()):
            raise UserError(
                f"{type(self).__name__}.relative_bias: needs plain attention with equally many heads in all blocks"
            )
        return kinds.pop()

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
            if self.residual_scale != 1.0:
                raise UserError(f"{name}.blocks: say their residual_scale themselves; leave it at 1 here")
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
            ffn: FFN | MoELayer = self.ffn
            if kind == "moe" and self.moe is not None:
                ffn = self.moe if self.num_experts is None else self.moe.replace(num_experts=next(counts))
            parts: dict[str, Any] = {"residual_scale": self.residual_scale, "dropout": self.dropout}
            kind_of = Block if self.norm_order == "pre" else PostNormBlock
            blocks.append(kind_of(mixer=self.attention, ffn=ffn, norm=self.norm, **parts))
        return tuple(blocks)

    def ends_normed(self) -> bool:
        """Whether the last block ends in a norm, so that no further one follows."""
        return isinstance(self.resolved()[-1], PostNormBlock | PostNormCrossBlock)


@config
class Decoder(Stack):
    """A causal language model.

    Either `attention`, `ffn`, `moe`, `layout` and `num_experts` describe the blocks, or `blocks` lists them one by one.
    """

    builds: ClassVar[str] = "moestro.models.decoder:Decoder"
    tied: bool = False
    """Whether the head uses the embedding's matrix."""
    head_bias: bool = False
    """Whether the head has a bias, also where its matrix is the embedding's."""
    logits_scaling: float = 1.0
    """Logits, before the bias, are divided by this (Granite)."""
    allow_noncausal: bool = False
    """Accept routers that look at later tokens (generation then differs from training)."""
    cross: CrossAttention | None = None
    """Attention of every block to a memory; such a decoder is part of an EncoderDecoder."""
    source_dim: int | None = None
    """Width of the memory; None = the model's."""

    def resolved(self) -> tuple[Block, ...]:
        made = super().resolved()
        if self.cross is None:
            return made
        if self.blocks is not None:
            raise UserError("Decoder.blocks: say their cross-attention themselves (CrossBlock); leave cross unset")
        cross = {"cross": self.cross, "source_dim": self.source_dim}
        kind = CrossBlock if self.norm_order == "pre" else PostNormCrossBlock
        return tuple(kind(**{f.name: getattr(b, f.name) for f in dataclasses.fields(b)}, **cross) for b in made)

    def branches(self) -> int:
        return sum(3 if isinstance(b, CrossBlock) else 2 for b in self.resolved())


@config
class Encoder(Stack):
    """Blocks in which every token sees its whole sequence; no head.

    Either `attention`, `ffn`, `moe`, `layout` and `num_experts` describe the blocks, or `blocks` lists them one by one.
    """

    builds: ClassVar[str] = "moestro.models.encoder:Encoder"
    attention: Mixer = Attention(causal=False)
    """The attention of every block."""

    def resolved(self) -> tuple[Block, ...]:
        made = super().resolved()
        for i, block in enumerate(made):
            if getattr(block.mixer, "causal", True):
                raise UserError(f"Encoder: block {i} looks back only; give it attention with causal=False")
            if isinstance(block, CrossBlock):
                raise UserError(f"Encoder: block {i} looks at a memory, and an encoder has none; use Block")
        return made


@config
class EncoderDecoder(Config):
    """An encoder, and a decoder whose blocks look at what it made.

    `flops_per_token(seq_len)` is for one token of the source and one of the target, both sequences of seq_len: what
    both sides cost at that length. For other lengths see the model's `flops(source_len, target_len)`.
    """

    builds: ClassVar[str] = "moestro.models.encoder_decoder:EncoderDecoder"
    encoder: Encoder = Encoder()
    """The side that reads the source."""
    decoder: Decoder = Decoder(cross=CrossAttention())
    """The side that writes the target; its blocks have cross-attention."""
    shared: bool = True
    """Whether both sides have one table of embeddings."""
    start: int = 0
    """The token that the decoder reads first."""
    seed: int = 0
    """Seed of the initial values, in place of those of the sides."""

    def __post_init__(self) -> None:
        e, d = self.encoder, self.decoder
        blocks = [b for b in d.resolved() if isinstance(b, CrossBlock)]
        if not blocks:
            raise UserError("EncoderDecoder.decoder: no block looks at the encoder; set Decoder.cross")
        for block in blocks:
            width = d.dim if block.source_dim is None else block.source_dim
            if width != e.dim:
                raise UserError(f"EncoderDecoder: the encoder is {e.dim} wide, cross-attention expects {width}")
        if self.shared and (e.vocab_size != d.vocab_size or e.dim != d.dim):
            raise UserError("EncoderDecoder.shared: both sides need the same vocab_size and dim; set it to false")
        if not 0 <= self.start < d.vocab_size:
            raise UserError(f"EncoderDecoder.start: {self.start} is no token of 0..{d.vocab_size - 1}")

    def seeds(self, seed: int | None = None) -> tuple[int, int]:
        """Seeds of the two sides, which have parameters of the same names."""
        seed = self.seed if seed is None else seed
        return 2 * seed, 2 * seed + 1

    def sides(self) -> tuple[Encoder, Decoder]:
        """Encoder and decoder with their seeds."""
        here, there = self.seeds()
        return self.encoder.replace(seed=here), self.decoder.replace(seed=there)


@config
class Headed(Config):
    """An encoder with a head for one task, and possibly one more layer, dense or routed, between them."""

    builds: ClassVar[str] = "moestro.models.headed:Headed"
    encoder: Encoder = Encoder()
    """What reads the text."""
    head: Head = ClassHead()
    """What the task asks for."""
    top: FFN | MoELayer | None = None
    """A layer whose output the head reads in place of the encoder's, without residual or norm (13); None = none."""
    features: int = 0
    """How many numbers beside its id each token comes with (such as: it occurs in the question)."""
    seed: int = 0
    """Seed of the initial values, in place of the encoder's."""

    def __post_init__(self) -> None:
        self.at_least(0, "features")
