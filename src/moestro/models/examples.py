"""Tiny members of every kind of network; tests are generated from them."""

from __future__ import annotations

from ..experts.config import MLP, ClampedGated, Gated
from ..moe.config import AttentionExperts, MoELayer
from ..nn.config import (
    Attention,
    CrossAttention,
    FeedForward,
    LatentAttention,
    LayerNorm,
    Learned,
    LongRoPE,
    NoNorm,
    PlainFeedForward,
    RelativeBias,
    Rotary,
    Sinusoidal,
    YaRN,
)
from ..nn.embeddings import Glyphs, IdCode
from ..routers.config import (
    Constant,
    GroupLimited,
    Label,
    Linear,
    LossFree,
    NearBest,
    Raw,
    Renormalised,
    Router,
    SoftmaxKept,
    SparseMixer,
    TopK,
    Uniform,
)
from .config import Block, Decoder, Encoder, EncoderDecoder, Headed, ParallelBlock
from .heads_config import ClassHead, EmbeddingHead, SpanHead

__all__ = ["encoder_decoders", "encoders", "examples", "with_heads"]

_ATTENTION = Attention(num_heads=4, num_kv_heads=2, head_dim=6)
_LATENT = LatentAttention(num_heads=3, kv_rank=12, nope_dim=6, rope_dim=4, value_dim=5)
_DENSE = FeedForward(width=20)
_MOE = MoELayer(num_experts=4, router=Router(select=TopK(k=2)), experts=Gated(width=12))
_BIAS = RelativeBias(buckets=8, max_distance=16)
_SWITCH = MoELayer(
    num_experts=4,
    router=Router(select=TopK(k=1), weigh=Raw()),
    experts=MLP(width=12, activation="relu"),
)


def examples() -> dict[str, Decoder]:
    """Name -> config, each built in milliseconds."""
    base = Decoder(vocab_size=37, dim=16, num_layers=2, attention=_ATTENTION, ffn=_DENSE, moe=_MOE, context=32)
    shared = _MOE.replace(shared=Gated(width=8))
    windowed = Block(mixer=_ATTENTION.replace(window=5), ffn=_MOE)
    whole = Block(mixer=_ATTENTION.replace(positions=None), ffn=shared)
    dense = Block(mixer=_ATTENTION, ffn=_DENSE)
    yarn = Rotary(style="interleaved", fraction=0.5, scaling=YaRN(factor=4.0, original_context=8))
    attentions = AttentionExperts(num_experts=3, attention=_ATTENTION)
    top1 = attentions.replace(shared_kv=True, router=Router(select=TopK(k=1), weigh=Raw()))
    stretched = Rotary(
        style="interleaved", scaling=YaRN(factor=4.0, original_context=8, mscale=0.7, mscale_all_dim=1.0)
    )
    groups = LossFree(inner=GroupLimited(groups=2, kept=1, inner=TopK(k=2)))
    sink = _ATTENTION.replace(sinks=True, bias="all")
    clamped = _MOE.replace(
        router=Router(score=Linear(bias=True), select=TopK(k=2), weigh=SoftmaxKept()),
        experts=ClampedGated(width=12, limit=1.5),
    )
    sliding, full = Block(mixer=sink.replace(window=4), ffn=clamped), Block(mixer=sink, ffn=clamped)
    long = LongRoPE(short_factor=(1.0, 2.0, 3.0), long_factor=(1.0, 4.0, 9.0), original_context=5, use="long")
    mixed = _MOE.replace(router=Router(select=SparseMixer(epsilon=0.3), weigh=NearBest(epsilon=0.3)))
    v3 = Router(activation="sigmoid", select=groups, weigh=Renormalised(scale=2.5, epsilon=1e-20))
    return {
        "moe": base,
        "dense": base.replace(moe=None),
        "mixed": base.replace(num_layers=3, layout=("dense", "moe", "moe"), num_experts=(3, 6), tied=True),
        "shared": base.replace(moe=shared, checkpoint=True, embedding_scale=4.0),
        "windowed": base.replace(attention=_ATTENTION.replace(window=4, qk_norm="full", bias="all")),
        "yarn": base.replace(attention=_ATTENTION.replace(head_dim=8, qk_norm="head", positions=yarn)),
        "latent": base.replace(attention=_LATENT),
        "latent-v3": base.replace(
            num_layers=3,
            layout=("dense", "moe", "moe"),
            attention=_LATENT.replace(q_rank=8, value_dim=16, bias=True, positions=stretched),
            moe=shared.replace(router=v3, losses=()),
        ),
        "blocks": base.replace(num_layers=3, blocks=(windowed, dense, whole)),
        "sinks": base.replace(num_layers=3, blocks=(sliding, full, sliding)),
        "multipliers": base.replace(
            attention=_ATTENTION.replace(scale=0.3), embedding_scale=3.0, residual_scale=0.4, logits_scaling=0.5
        ),
        "sparse_mixer": base.replace(
            attention=_ATTENTION.replace(positions=Rotary(scaling=long)), moe=mixed, norm=LayerNorm(), head_bias=True
        ),
        "id_code": base.replace(embedding=IdCode(bits=8), embedding_scale=0.5, layout=("dense", "moe")),
        "glyphs": base.replace(embedding=Glyphs(cell=8), moe=None, tied=True),
        "tied_bias": base.replace(tied=True, head_bias=True),
        "parallel": base.replace(blocks=(ParallelBlock(mixer=_ATTENTION, ffn=_MOE),) * 2),
        "attention_experts": base.replace(blocks=(ParallelBlock(mixer=attentions, ffn=_MOE),) * 2, checkpoint=True),
        "post_norm": base.replace(
            attention=_ATTENTION.replace(positions=None),
            positions=Learned(),
            norm=LayerNorm(),
            norm_order="post",
            embedding_norm=LayerNorm(),
            layout=("moe", "dense"),
        ),
        "shared_keys": base.replace(blocks=(Block(mixer=top1, ffn=_DENSE), Block(mixer=top1, ffn=_MOE))),
    }


def encoders() -> dict[str, Encoder]:
    """Name -> config of encoders, each built in milliseconds."""
    both = _ATTENTION.replace(causal=False)
    base = Encoder(vocab_size=37, dim=16, num_layers=2, attention=both, ffn=_DENSE, moe=_MOE, context=32)
    plain = both.replace(positions=None)
    own = Block(mixer=both.replace(positions=_BIAS, qk_norm="head"), ffn=_MOE)
    return {
        "moe": base,
        "dense": base.replace(moe=None, checkpoint=True),
        "t5": base.replace(
            attention=plain.replace(scale=1.0),
            relative_bias=_BIAS,
            ffn=PlainFeedForward(width=20),
            moe=_SWITCH,
            layout=("dense", "moe"),
            checkpoint=True,
        ),
        "bert": base.replace(
            attention=plain.replace(bias="all"),
            positions=Learned(),
            ffn=PlainFeedForward(width=20, activation="gelu", bias=True),
            norm=LayerNorm(),
            layout=("moe", "dense"),
        ),
        "blocks": base.replace(blocks=(own, Block(mixer=both, ffn=_DENSE)), positions=Sinusoidal()),
        "modernbert": base.replace(
            num_layers=3,
            blocks=(
                Block(mixer=both, ffn=_DENSE, norm=LayerNorm(bias=False), mixer_norm=NoNorm()),
                Block(mixer=both.replace(window=3), ffn=_MOE, norm=LayerNorm(bias=False)),
                Block(mixer=both.replace(window=3), ffn=_DENSE, norm=LayerNorm(bias=False)),
            ),
            norm=LayerNorm(bias=False),
            embedding_norm=LayerNorm(bias=False),
        ),
        "post_norm": base.replace(
            attention=plain.replace(bias="all"),
            positions=Learned(),
            norm=LayerNorm(),
            norm_order="post",
            embedding_norm=LayerNorm(),
            layout=("dense", "moe"),
        ),
    }


def encoder_decoders() -> dict[str, EncoderDecoder]:
    """Name -> config of encoder-decoders, each built in milliseconds."""
    t5, moe = encoders()["t5"], encoders()["moe"]
    cross = CrossAttention(num_heads=4, head_dim=6)
    writer = examples()["moe"].replace(cross=cross)
    learned = {"positions": Learned()}
    return {
        "t5": EncoderDecoder(
            encoder=t5,
            decoder=writer.replace(
                attention=t5.attention.replace(causal=True),
                relative_bias=_BIAS,
                cross=cross.replace(scale=1.0),
                ffn=t5.ffn,
                moe=_SWITCH,
                layout=("moe", "dense"),
                tied=True,
                logits_scaling=4.0,
                checkpoint=True,
            ),
        ),
        "rotary": EncoderDecoder(
            encoder=moe.replace(dim=12, vocab_size=31),
            decoder=writer.replace(cross=cross.replace(num_kv_heads=2, qk_norm=True, bias="all"), source_dim=12),
            shared=False,
            start=1,
        ),
        "post_norm": EncoderDecoder(
            encoder=encoders()["post_norm"],
            decoder=examples()["post_norm"].replace(cross=cross, tied=True, embedding_norm=None),
        ),
        "dense": EncoderDecoder(
            encoder=moe.replace(moe=None, **learned), decoder=writer.replace(moe=None, tied=True, **learned)
        ),
    }


def with_heads() -> dict[str, Headed]:
    """Name -> config of encoders with a head, each built in milliseconds."""
    moe, plain = encoders()["moe"], encoders()["dense"]
    named = (
        moe.moe.replace(router=Router(score=Uniform(), select=Label(), weigh=Constant()), losses=())
        if moe.moe
        else None
    )
    return {
        "spans": Headed(encoder=plain, head=SpanHead(), top=_SWITCH, features=1),
        "spans_dense": Headed(encoder=moe, head=SpanHead(), top=PlainFeedForward(width=24), features=2),
        "classes": Headed(encoder=encoders()["post_norm"], head=ClassHead(num_classes=5)),
        "classes_first": Headed(encoder=plain, head=ClassHead(num_classes=5, pooling="first")),
        "embeddings": Headed(encoder=moe.replace(moe=named), head=EmbeddingHead(temperature=0.7)),
    }
