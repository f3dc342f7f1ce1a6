"""Presets of embeddings that are trained on pairs of texts."""

from __future__ import annotations

from collections.abc import Callable

from ...core.errors import UserError
from ...experts.config import Gated
from ...losses.config import MNRPlus
from ...models.config import Encoder, Headed
from ...models.heads_config import EmbeddingHead
from ...moe.config import MoELayer
from ...nn.config import Attention, FeedForward, LayerNorm
from ...optim.config import AdamW
from ...routers.config import Constant, Label, Router, Uniform
from ...tasks.config import MatchPairs, TextPairs
from ...tasks.data.config import Banking77, CoCitation, Gsm8k, Multi30k, PairDomains
from ..config import TrainRun

__all__ = ["PRESETS", "embedder", "labelled"]


def embedder(
    *,
    dim: int = 128,
    width: int = 256,
    num_layers: int = 4,
    num_heads: int = 4,
    vocab_size: int = 8000,
    context: int = 128,
) -> Headed:
    """A dense encoder of ModernBERT's kind whose head makes an embedding of a text (brief 34, second generation)."""
    return Headed(
        encoder=Encoder(
            vocab_size=vocab_size,
            dim=dim,
            num_layers=num_layers,
            attention=Attention(num_heads=num_heads, causal=False),
            ffn=FeedForward(width=width, activation="gelu"),
            norm=LayerNorm(bias=False),
            embedding_norm=LayerNorm(bias=False),
            context=context,
            init_std=None,
        ),
        head=EmbeddingHead(),
    )


def labelled(model: Headed, num_experts: int, layers: tuple[int, ...] | None = None) -> Headed:
    """The model with an expert per domain in place of the feed-forward layers, all or those named; the batch's domain
    names the expert of all tokens of a text, and no router learns (brief 34)."""
    encoder = model.encoder
    ffn = encoder.ffn
    if not isinstance(ffn, FeedForward):
        raise UserError("labelled: takes an encoder whose feed-forward layers are gated and all alike")
    moe = MoELayer(
        num_experts=num_experts,
        router=Router(score=Uniform(), select=Label(), weigh=Constant(value=1.0)),
        experts=Gated(width=ffn.width, activation=ffn.activation),
        losses=(),
    )
    kinds = tuple("moe" if layers is None or i in layers else "dense" for i in range(encoder.num_layers))
    return model.replace(encoder=encoder.replace(moe=moe, layout=kinds if "dense" in kinds else None))


def _contrastive_moe_embeddings() -> TrainRun:
    """Embeddings of texts with an expert per domain (Contrastive MoE embeddings); default: pairs of five domains."""
    captions = Multi30k(), Multi30k(target_language="fr")
    domains = PairDomains(parts=(Banking77(), *captions, Gsm8k(notes=False), CoCitation()))
    return TrainRun(
        model=labelled(embedder(dim=96, width=192, num_layers=3), len(domains.parts)),
        data=TextPairs(published=domains, domain_tokens=True, swap=True),
        objective=MatchPairs(loss=MNRPlus()),
        optimizer=AdamW(lr=1e-3),
        steps=1000,
        batch_size=64,
        seq_len=48,
    )


PRESETS: dict[str, Callable[[], TrainRun]] = {"contrastive-moe-embeddings": _contrastive_moe_embeddings}
