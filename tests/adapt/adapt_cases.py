"""Small adapted models for the tests of adapters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.adapt.attach import factors
from moestro.models.config import Decoder
from moestro.models.examples import examples


def tokens(B: int = 2, S: int = 9, seed: int = 0, vocab: int = 37) -> Tensor:
    return torch.randint(0, vocab, (B, S), generator=torch.Generator().manual_seed(seed))


def decoder(name: str = "moe", **changes: object) -> nn.Module:
    config: Decoder = examples()[name].replace(**changes)
    return config.build()


def perturb(model: nn.Module, std: float = 0.3) -> None:
    """Give all factors values that matter (B starts at zero)."""
    with torch.no_grad():
        for i, p in enumerate(factors(model).values()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * std)


def loss(model: nn.Module, given: Tensor) -> Tensor:
    nats, number, _, trail = model.loss(given, given)  # type: ignore[operator]
    return nats / number + trail.loss()
