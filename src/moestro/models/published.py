"""Published sparse models as configs. Sizes are those of the released checkpoints; no weights come with them."""

from __future__ import annotations

from ..core.errors import UserError, did_you_mean
from ..experts.config import Gated
from ..moe.config import MoELayer
from ..nn.config import Attention, RMSNorm, Rotary
from ..routers.config import Raw, Router, TopK
from .config import Decoder

__all__ = ["PUBLISHED", "published"]


def _mixtral_8x7b() -> Decoder:
    """Mixtral 8x7B (Jiang et al. 2024, arXiv 2401.04088): 46.7B parameters, 12.9B active."""
    return Decoder(
        vocab_size=32_000,
        dim=4096,
        num_layers=32,
        attention=Attention(num_heads=32, num_kv_heads=8, head_dim=128, positions=Rotary(base=1e6)),
        moe=MoELayer(num_experts=8, router=Router(select=TopK(k=2)), experts=Gated(width=14_336)),
        norm=RMSNorm(eps=1e-5),
        context=32_768,
    )


def _qwen3_30b_a3b() -> Decoder:
    """Qwen3-30B-A3B (Yang et al. 2025, arXiv 2505.09388): 30.5B parameters, 3.3B active."""
    return Decoder(
        vocab_size=151_936,
        dim=2048,
        num_layers=48,
        attention=Attention(
            num_heads=32, num_kv_heads=4, head_dim=128, qk_norm="head", positions=Rotary(base=1e6), norm_eps=1e-6
        ),
        moe=MoELayer(num_experts=128, router=Router(select=TopK(k=8)), experts=Gated(width=768)),
        norm=RMSNorm(eps=1e-6),
        context=40_960,
    )


def _olmoe_1b_7b() -> Decoder:
    """OLMoE-1B-7B (Muennighoff et al. 2024, arXiv 2409.02060): 6.9B parameters, 1.3B active."""
    return Decoder(
        vocab_size=50_304,
        dim=2048,
        num_layers=16,
        attention=Attention(num_heads=16, head_dim=128, qk_norm="full", norm_eps=1e-5),
        moe=MoELayer(num_experts=64, router=Router(select=TopK(k=8), weigh=Raw()), experts=Gated(width=1024)),
        norm=RMSNorm(eps=1e-5),
        context=4096,
    )


PUBLISHED = {"mixtral-8x7b": _mixtral_8x7b, "qwen3-30b-a3b": _qwen3_30b_a3b, "olmoe-1b-7b": _olmoe_1b_7b}


def published(name: str) -> Decoder:
    """The config of a published model by its name. Raises `UserError` for an unknown one."""
    if name not in PUBLISHED:
        raise UserError(f"unknown model {name!r}{did_you_mean(name, PUBLISHED)}; known: {', '.join(PUBLISHED)}")
    return PUBLISHED[name]()
