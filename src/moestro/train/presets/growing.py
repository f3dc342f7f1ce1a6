"""The preset of Growing Transformers."""

from __future__ import annotations

from collections.abc import Callable

from ...models.config import Decoder
from ...nn.config import Attention, FeedForward
from ...nn.embeddings import IdCode
from ...optim.config import AdamW
from ..config import TrainRun

__all__ = ["PRESETS"]


def _growing_transformers() -> TrainRun:
    """Two blocks on an embedding of bits that never trains: the first stage of a decoder that is grown by layers.

    Later stages are runs of their own: new blocks on top, then only they, the last norm and the head train.

        moestro train growing-transformers --data FOLDER --out stage1
        moestro convert stage1 stage1-deeper --method grow --blocks 2
        moestro train growing-transformers --data FOLDER --start stage1-deeper --frozen embed 0:2 --out stage2

    And low-rank updates of all blocks in a last run:

        moestro train growing-transformers --data FOLDER --start stage2 --out last \\
            --set adapters=adapt.LoRA --adapters.targets attention ffn

    In Python, head and all: `adapt.growth.growing`. Source: brief 45.
    """
    return TrainRun(
        model=Decoder(
            dim=128,
            num_layers=2,
            attention=Attention(num_heads=4, num_kv_heads=2, head_dim=32, qk_norm="head"),
            ffn=FeedForward(width=352),
            embedding=IdCode(bits=16),
            context=256,
            init_std=None,
        ),
        twin=False,
        optimizer=AdamW(lr=4e-3),
        steps=1000,
        batch_size=16,
        seq_len=128,
    )


PRESETS: dict[str, Callable[[], TrainRun]] = {"growing-transformers": _growing_transformers}
