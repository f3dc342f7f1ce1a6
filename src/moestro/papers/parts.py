"""Parts of systems that have no file of their own yet: what -> `module:Name`, empty where it is still to be written.

When a system gets its file, its parts move there. Systems whose parts nobody has named yet are not listed.
"""

from __future__ import annotations

__all__ = ["PARTS"]

PARTS: dict[str, dict[str, str]] = {
    "bam": {
        "branches into one mixture": "moestro.convert.config:BranchAttendMix",
        "experts of attention": "moestro.moe.config:AttentionExperts",
        "attention and experts side by side": "moestro.models.config:ParallelBlock",
    },
    "muon-mla-moe": {
        "optimiser": "moestro.optim.config:Muon",
        "latent attention": "moestro.nn.config:LatentAttention",
        "bias without a loss": "moestro.routers.config:LossFree",
    },
    "ewa": {
        "random partition": "moestro.routers.config:Partition",
        "averaging after a step": "moestro.optim.config:ExpertAveraging",
        "averaged experts in evaluation": "moestro.moe.config:AveragedExperts",
    },
}
