"""Logits equal those of transformers' models of the same weights: an oracle that somebody else wrote."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from moestro.experts import Gated
from moestro.models import Decoder
from moestro.moe import MoELayer
from moestro.nn import Attention, RMSNorm, Rotary, YaRN
from moestro.routers import Raw, Router, TopK
from moestro.testing.compare import assert_close

V, D, F, E = 41, 24, 20, 4
COMMON: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "num_experts_per_tok": 2,
}
QWEN: dict[str, Any] = {"num_key_value_heads": 1, "head_dim": 8, "moe_intermediate_size": F, "num_experts": E}
STRETCHED = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10_000.0}
MOE = MoELayer(num_experts=E, router=Router(select=TopK(k=2)), experts=Gated(width=F))
OURS = Decoder(vocab_size=V, dim=D, num_layers=2, context=64, moe=MOE)
RELEASED_YARN = Rotary(scaling=YaRN(factor=4.0, original_context=16, as_released=True))

CASES: dict[str, tuple[str, dict[str, Any], Decoder]] = {
    "mixtral": (
        "Mixtral",
        {"num_key_value_heads": 2, "intermediate_size": F, "num_local_experts": E, "sliding_window": 5},
        OURS.replace(
            attention=Attention(num_heads=4, num_kv_heads=2, window=5, positions=Rotary(base=1e6)),
            norm=RMSNorm(eps=1e-5),
        ),
    ),
    "qwen3": (
        "Qwen3Moe",
        {**QWEN, "norm_topk_prob": True},
        OURS.replace(attention=Attention(num_heads=4, num_kv_heads=1, head_dim=8, qk_norm="head")),
    ),
    "yarn": (
        "Qwen3Moe",
        {**QWEN, "norm_topk_prob": True, "rope_parameters": STRETCHED},
        OURS.replace(
            attention=Attention(num_heads=4, num_kv_heads=1, head_dim=8, qk_norm="head", positions=RELEASED_YARN)
        ),
    ),
    "olmoe": (
        "Olmoe",
        {"num_key_value_heads": 4, "intermediate_size": F, "num_experts": E, "norm_topk_prob": False},
        OURS.replace(
            attention=Attention(num_heads=4, qk_norm="full", norm_eps=1e-5),
            moe=MOE.replace(router=Router(select=TopK(k=2), weigh=Raw())),
            norm=RMSNorm(eps=1e-5),
        ),
    ),
}
NAMES = (
    ("model.", ""),
    ("embed_tokens", "embed"),
    ("lm_head", "head"),
    ("input_layernorm", "mixer_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn", "mixer"),
    ("mlp.", "ffn."),
    ("gate.weight", "router.score.weight"),
    ("_proj.weight", ".weight"),
    ("gate_up_proj", "gate_up"),
    ("down_proj", "down"),
)


def renamed(name: str) -> str:
    for theirs, ours in NAMES:
        name = name.replace(theirs, ours)
    return name


@pytest.mark.parametrize("name", CASES)
def test_logits(name: str) -> None:
    transformers = importlib.import_module("transformers")
    family, fields, config = CASES[name]
    theirs = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**COMMON, **fields))
    torch.manual_seed(0)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours = config.build()
    ours.load_state_dict({renamed(n): t for n, t in theirs.state_dict().items()})
    x = torch.randint(0, V, (2, 17))
    with torch.no_grad():
        assert_close("logits", ours.eval()(x)[0], theirs.eval()(x).logits, 1e-5)
