"""Small options of every method; tests are generated from them."""

from __future__ import annotations

from ..models.config import Block
from ..nn.config import Attention
from ..routers.config import Constant, Raw, SoftmaxKept
from .config import (
    AddExperts,
    Average,
    BranchAttendMix,
    BranchTrainMix,
    Cluster,
    Conversion,
    Copy,
    Distil,
    Extend,
    GranularSplit,
    Grow,
    MergeExperts,
    Modular,
    MostLoaded,
    PartialReinit,
    Prune,
    Taylor,
)

__all__ = ["examples"]


def examples() -> dict[str, Conversion]:
    """Small options of every method, for a model with at least two layers to convert; tests are generated from them."""
    return {
        "copy": Copy(num_experts=4),
        "copy_one": Copy(num_experts=2, top_k=1),
        "copy_shared": Copy(num_experts=3, shared=True, layers=(1,)),
        "copy_raw": Copy(num_experts=4, weigh=Raw()),
        "granular": GranularSplit(num_experts=8, top_k=2, granularity=2),
        "granular_copies": GranularSplit(num_experts=8, top_k=4, granularity=2, router="centroids"),
        "modular": Modular(num_experts=4, top_k=4),
        "modular_half": Modular(num_experts=4, top_k=2, weigh=SoftmaxKept(), frozen=False),
        "reinit": PartialReinit(num_experts=4, share=0.5),
        "cluster": Cluster(num_experts=4, top_k=2),
        "cluster_all": Cluster(num_experts=4, top_k=4, by="activations", weigh=Constant(value=1.0)),
        "taylor": Taylor(num_experts=4, top_k=2, shared=0.2),
        "btx": BranchTrainMix(),
        "btx_one": BranchTrainMix(top_k=1, weigh=Constant(value=1.0), extra=2, layers=(1,)),
        "bam": BranchAttendMix(),
        "bam_shared": BranchAttendMix(top_k=2, shared_kv=True, layers=(0,)),
        "bam_top": BranchAttendMix(attention_top_k=2, extra=1, weigh=Constant(value=1.0)),
        "average": Average(),
        "most_loaded": MostLoaded(),
        "distil": Distil(steps=3, batch=16),
        "distil_logits": Distil(steps=2, batch=32, match="logits"),
        "prune": Prune(keep=3),
        "prune_similar": Prune(keep=2, score="output_similarity", layers=(0,)),
        "merge": MergeExperts(keep=2),
        "add": AddExperts(add=1, noise=0.1),
        "add_loaded": AddExperts(add=2, score="load"),
        "extend": Extend(),
        "grow": Grow(),
        "grow_random": Grow(blocks=2, block=Block(mixer=Attention(num_heads=2)), start="random", freeze=False),
    }
