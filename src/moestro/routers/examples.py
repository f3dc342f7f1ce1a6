"""Tiny routers of every family, by name: tests and the conformance suite are generated from them."""

from __future__ import annotations

from . import config as cfg

__all__ = ["examples"]


def examples() -> dict[str, cfg.Router]:
    """name -> config. All are built with 8 experts and any width; what signals one needs is in its built `needs`."""
    raw, top2 = cfg.Raw(), cfg.TopK(k=2)
    capacity = cfg.Capacity(factor=1.0, min_capacity=1)
    return {
        # score x top-k
        "linear": cfg.Router(),
        "linear-bias-top1-raw": cfg.Router(score=cfg.Linear(bias=True), select=cfg.TopK(k=1), weigh=raw),
        "linear-one-hot": cfg.Router(score=cfg.Linear(init_std=1.0), weigh=cfg.Renormalised(epsilon=1e-9)),
        "linear-top3-softmax-kept": cfg.Router(select=cfg.TopK(k=3), weigh=cfg.SoftmaxKept()),
        "linear-top6": cfg.Router(select=cfg.TopK(k=6)),
        "linear-sigmoid": cfg.Router(activation="sigmoid"),
        "linear-cool": cfg.Router(temperature=0.5, weigh=raw),
        "mlp": cfg.Router(score=cfg.MLP(hidden=12, depth=2)),
        "cosine": cfg.Router(score=cfg.Cosine()),
        "cosine-low-rank": cfg.Router(score=cfg.Cosine(rank=4)),
        "cosine-identity": cfg.Router(
            score=cfg.Cosine(scale=1.0, learned_scale=False), activation="identity", select=cfg.TopK(k=1), weigh=raw
        ),
        "frozen": cfg.Router(score=cfg.Frozen(inner=cfg.Linear(bias=True)), weigh=cfg.SoftmaxKept()),
        "noisy": cfg.Router(score=cfg.Noisy()),
        "jitter": cfg.Router(score=cfg.Jitter(noise=0.2), select=cfg.TopK(k=1), weigh=raw),
        "fixed-noise": cfg.Router(score=cfg.FixedNoise(), weigh=raw),
        # other selections
        "top-p": cfg.Router(select=cfg.TopP(p=0.4, max_k=4), weigh=raw),
        "top-p-released": cfg.Router(select=cfg.TopP(p=0.4, expected=2.5, as_released=True), weigh=raw),
        "top-p-cosine": cfg.Router(score=cfg.Cosine(), select=cfg.TopP(p=0.6)),
        "expert-choice": cfg.Router(select=cfg.ExpertChoiceSelect(capacity_factor=2.0), weigh=raw),
        "expert-choice-segment": cfg.Router(
            score=cfg.Cosine(), select=cfg.ExpertChoiceSelect(capacity_factor=2.0, per="segment"), weigh=raw
        ),
        "label": cfg.Router(score=cfg.Uniform(), select=cfg.Label(), weigh=cfg.Constant()),
        "task-raw": cfg.Router(select=cfg.Label(signal="task"), weigh=raw),
        "random-token": cfg.Router(score=cfg.Uniform(), select=cfg.Random(k=2), weigh=cfg.Constant()),
        "random-sequence": cfg.Router(score=cfg.Uniform(), select=cfg.Random(level="sequence"), weigh=cfg.Constant()),
        "random-batch": cfg.Router(score=cfg.Uniform(), select=cfg.Random(level="batch"), weigh=cfg.Constant()),
        "random-released": cfg.Router(
            score=cfg.Uniform(),
            select=cfg.Random(level="batch", evaluation="sequence", as_released=True),
            weigh=cfg.Constant(),
        ),
        "partition": cfg.Router(score=cfg.Uniform(), select=cfg.Partition(), weigh=cfg.Constant()),
        "gumbel": cfg.Router(select=cfg.Gumbel(k=2)),
        "gumbel-always": cfg.Router(score=cfg.MLP(hidden=12), select=cfg.Gumbel(k=1, when="always"), weigh=raw),
        "sparse-mixer": cfg.Router(select=cfg.SparseMixer(epsilon=0.3), weigh=cfg.NearBest(epsilon=0.3)),
        "sparse-mixer-top1": cfg.Router(select=cfg.SparseMixer(k=1, epsilon=0.6), weigh=cfg.NearBest(epsilon=0.6)),
        "top-k-near-best": cfg.Router(select=cfg.TopK(k=3), weigh=cfg.NearBest(epsilon=0.5), limit=capacity),
        "all": cfg.Router(select=cfg.All(), weigh=raw),
        "all-mlp": cfg.Router(score=cfg.MLP(hidden=12), select=cfg.All(), weigh=cfg.SoftmaxKept()),
        "group-max": cfg.Router(select=cfg.GroupLimited(groups=4, kept=2, by="max", inner=top2)),
        "loss-free": cfg.Router(
            activation="sigmoid", select=cfg.LossFree(inner=top2), weigh=cfg.Renormalised(scale=2.5)
        ),
        "loss-free-groups": cfg.Router(
            activation="sigmoid", select=cfg.LossFree(inner=cfg.GroupLimited(groups=4, kept=2, inner=cfg.TopK(k=3)))
        ),
        "epsilon": cfg.Router(activation="sigmoid", weigh=cfg.Renormalised(scale=2.5, epsilon=0.25)),
        "loss-free-softmax-floor": cfg.Router(select=cfg.LossFree(inner=top2), weigh=cfg.Renormalised(floor=0.3)),
        # mixes
        "similarity-mix": cfg.Router(mix=cfg.SimilarityMix()),
        "similarity-mix-top-p": cfg.Router(
            score=cfg.Cosine(),
            mix=cfg.SimilarityMix(tau=0.5, scale="sqrt_dim", start="random", causal=False),
            select=cfg.TopP(p=0.5, max_k=4),
            weigh=raw,
        ),
        "attention-mix": cfg.Router(mix=cfg.AttentionMix()),
        "attention-mix-posterior": cfg.Router(mix=cfg.AttentionMix(heads="posterior", sigma=0.5)),
        # whole sequences
        "sentence-top-k": cfg.Router(score=cfg.SegmentMean(), weigh=raw),
        "sentence-top1": cfg.Router(
            score=cfg.SegmentMean(inner=cfg.Linear(bias=True)), select=cfg.TopK(k=1), weigh=raw
        ),
        # limits
        "capacity": cfg.Router(limit=capacity),
        "capacity-first-choices": cfg.Router(limit=capacity.replace(priority=cfg.FirstChoices())),
        "capacity-probability": cfg.Router(weigh=raw, limit=capacity.replace(priority=cfg.ByProbability())),
        "capacity-batch-prioritised": cfg.Router(weigh=raw, limit=capacity.replace(priority=cfg.BatchPrioritised())),
        "capacity-recycle": cfg.Router(weigh=raw, limit=capacity.replace(priority=cfg.Recycle())),
        "capacity-fixed": cfg.Router(select=cfg.TopK(k=1), weigh=raw, limit=cfg.FixedCapacity(size=2)),
        "capacity-segment": cfg.Router(limit=capacity.replace(per="segment")),
        "capacity-down": cfg.Router(limit=capacity.replace(per="segment", rounding="down")),
        "gshard": cfg.Router(limit=cfg.RandomSecond(then=capacity.replace(priority=cfg.FirstChoices()))),
        # virtual ids and subsets
        "null": cfg.Router(select=top2, weigh=raw, virtual=("null",)),
        "null-and-copy": cfg.Router(select=top2, virtual=("null", "copy"), limit=capacity),
        "subset": cfg.Router(subset=(1, 4, 6)),
        "subset-copy-top-p": cfg.Router(select=cfg.TopP(p=0.5), weigh=raw, subset=(0, 2, 5, 7), virtual=("copy",)),
    }
