"""What adapters cost, counted from configs without any weights."""

from __future__ import annotations

import functools

import torch

from ..core.account import Cost, cost
from ..core.config import Config
from .attach import attach
from .config import Adapter

__all__ = ["count"]


@functools.lru_cache(maxsize=64)
def count(model: Config, adapter: Adapter, seq_len: int = 1) -> tuple[int, Cost]:
    """(parameters that train, cost of the whole) of what `model` builds with adapters on it, at sequences of seq_len.

    Frozen weights cost no gradient of their own in `Cost.train_flops`.
    """
    with torch.device("meta"):
        made = model.build()
        trainable = attach(made, adapter).trainable
    return trainable, cost(made, seq_len)
