"""Published sparse models as configs. Sizes are those of the released checkpoints; no weights come with them."""

from __future__ import annotations

from ..core.errors import UserError, did_you_mean
from ..experts.config import Gated
from ..moe.config import MoELayer
from ..nn.config import Attention, FeedForward, LatentAttention, RMSNorm, Rotary, YaRN
from ..routers.config import GroupLimited, LossFree, Raw, Renormalised, Router, Select, TopK
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


def _yarn(mscale: float) -> Rotary:
    """The positions of DeepSeek-V2 and V3: 4096 tokens stretched to 163840."""
    scaling = YaRN(factor=40.0, original_context=4096, mscale=mscale, mscale_all_dim=mscale, as_released=True)
    return Rotary(style="interleaved", scaling=scaling)


def _sigmoid(select: Select, scale: float) -> Router:
    """The router of DeepSeek-V3: sigmoid scores, a bias that takes part in the selection only, renormalised weights."""
    return Router(activation="sigmoid", select=LossFree(inner=select), weigh=Renormalised(scale=scale, epsilon=1e-20))


def _deepseek_v2_lite() -> Decoder:
    """DeepSeek-V2-Lite (DeepSeek-AI 2024, arXiv 2405.04434 appendix B): 15.7B parameters, 2.4B active."""
    return Decoder(
        vocab_size=102_400,
        dim=2048,
        num_layers=27,
        attention=LatentAttention(
            num_heads=16, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128, positions=_yarn(0.707)
        ),
        ffn=FeedForward(width=10_944),
        moe=MoELayer(
            num_experts=64,
            router=Router(select=TopK(k=6), weigh=Raw()),
            experts=Gated(width=1408),
            shared=Gated(width=2 * 1408),
        ),
        layout=("dense",) + ("moe",) * 26,
        norm=RMSNorm(eps=1e-6),
        context=163_840,
    )


def _deepseek_v3() -> Decoder:
    """DeepSeek-V3 (DeepSeek-AI 2024, arXiv 2412.19437): 671.03B parameters, 37.55B active.

    Without the multi-token prediction module, which generation does not need; input and output embeddings count.
    """
    return Decoder(
        vocab_size=129_280,
        dim=7168,
        num_layers=61,
        attention=LatentAttention(
            num_heads=128, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128, positions=_yarn(1.0)
        ),
        ffn=FeedForward(width=18_432),
        moe=MoELayer(
            num_experts=256,
            router=_sigmoid(GroupLimited(groups=8, kept=4, by="top2", inner=TopK(k=8)), 2.5),
            experts=Gated(width=2048),
            shared=Gated(width=2048),
            losses=(),
        ),
        layout=("dense",) * 3 + ("moe",) * 58,
        norm=RMSNorm(eps=1e-6),
        context=163_840,
    )


def _moonlight_16b_a3b() -> Decoder:
    """Moonlight-16B-A3B (Liu et al. 2025, arXiv 2502.16982): DeepSeek-V3's parts, 16B parameters, 3B active."""
    return Decoder(
        vocab_size=163_840,
        dim=2048,
        num_layers=27,
        attention=LatentAttention(
            num_heads=16,
            kv_rank=512,
            nope_dim=128,
            rope_dim=64,
            value_dim=128,
            positions=Rotary(base=50_000.0, style="interleaved"),
        ),
        ffn=FeedForward(width=11_264),
        moe=MoELayer(
            num_experts=64,
            router=_sigmoid(TopK(k=6), 2.446),
            experts=Gated(width=1408),
            shared=Gated(width=2 * 1408),
            losses=(),
        ),
        layout=("dense",) + ("moe",) * 26,
        norm=RMSNorm(eps=1e-5),
        context=8192,
    )


PUBLISHED = {
    "mixtral-8x7b": _mixtral_8x7b,
    "qwen3-30b-a3b": _qwen3_30b_a3b,
    "olmoe-1b-7b": _olmoe_1b_7b,
    "deepseek-v2-lite": _deepseek_v2_lite,
    "deepseek-v3": _deepseek_v3,
    "moonlight-16b-a3b": _moonlight_16b_a3b,
}


def published(name: str) -> Decoder:
    """The config of a published model by its name. Raises `UserError` for an unknown one."""
    if name not in PUBLISHED:
        raise UserError(f"unknown model {name!r}{did_you_mean(name, PUBLISHED)}; known: {', '.join(PUBLISHED)}")
    return PUBLISHED[name]()
