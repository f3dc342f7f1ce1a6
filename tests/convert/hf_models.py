"""Tiny Moestro decoders as transformers models, for the tests of the Auto classes."""

from __future__ import annotations

import torch

from moestro.convert.hf import MoestroConfig, MoestroForCausalLM
from moestro.experts.config import Gated
from moestro.losses.config import SwitchBalance
from moestro.models.config import Decoder
from moestro.moe.config import MoELayer
from moestro.nn.config import Attention, FeedForward
from moestro.routers.config import LossFree, Router, TopK

V = 37


def decoder(**changes: object) -> Decoder:
    moe = MoELayer(
        num_experts=4,
        router=Router(select=LossFree(inner=TopK(k=2), rate=0.05)),
        experts=Gated(width=16),
        losses=(SwitchBalance(coefficient=0.5),),
    )
    base = Decoder(
        vocab_size=V,
        dim=16,
        num_layers=2,
        attention=Attention(num_heads=2, num_kv_heads=1, head_dim=8, qk_norm="head"),
        ffn=FeedForward(width=32),
        moe=moe,
        context=48,
        init_std=0.3,
    )
    return base.replace(**changes)


def model(**changes: object) -> MoestroForCausalLM:
    made = MoestroForCausalLM(MoestroConfig(model=decoder(**changes)))
    with torch.no_grad():
        for layer in made.model.layers:
            layer.ffn.router.select.bias.copy_(torch.tensor([0.1, -0.05, 0.02, 0.0]))
    return made.eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, V, shape, generator=torch.Generator().manual_seed(seed))


def without_loss(coefficient: float = 0.0) -> MoELayer:
    moe = decoder().moe
    assert moe is not None
    return moe.replace(losses=(SwitchBalance(coefficient=coefficient),) if coefficient else ())
