"""What the tests of mixtures are made on."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from moestro.adapt import LayerAllocation, Mixture
from moestro.adapt.mixture.linear import MoELinear

SEVEN = tuple(f"*.{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down"))
TWO = LayerAllocation(experts=(2, 4), top_k=(2,), rank=(3,))


def llama(**sizes: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    small = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**(small | {"num_attention_heads": 4, "num_key_value_heads": 4} | sizes)))


def linear(E: int = 4, k: int = 2, std: float = 0.5, **more: object) -> MoELinear:
    torch.manual_seed(0)
    config = Mixture(allocation=LayerAllocation(experts=(E,), top_k=(k,), rank=(3,)), dropout=0.0, alpha=6.0, **more)
    made = MoELinear(nn.Linear(10, 7), config)
    with torch.no_grad():
        for p in (made.experts.a, made.experts.b, made.router.score.weight):
            p.copy_(torch.randn(p.shape) * std)
    return made
