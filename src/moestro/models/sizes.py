"""Sizes by counting: the published family of sparse models, tables, and families of equal active compute (brief 39)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError
from ..experts.config import Gated
from ..moe.config import MoELayer
from ..nn.config import Attention, RMSNorm
from ..routers.config import Raw, Renormalised, Router, SoftmaxKept, TopK
from .config import Decoder
from .twin import TOLERANCE

if TYPE_CHECKING:
    from ..core.account import Cost

__all__ = [
    "OPTIMAL_SPARSITY",
    "Size",
    "iso_compute",
    "optimal_sparsity",
    "optimal_sparsity_grid",
    "short_count",
    "size_name",
    "size_of",
    "size_table",
    "sparsity",
    "tokens_per_parameter",
]

OPTIMAL_SPARSITY: Mapping[str, Sequence[int]] = {
    "dim": (512, 1024, 2048),
    "num_experts": (8, 16, 32, 64, 128, 256),
    "top_k": (2, 4, 8, 16),
}
"""The grid of Optimal Sparsity of Mixture-of-Experts Language Models (arXiv 2508.18672)."""


def optimal_sparsity(dim: int, num_experts: int, top_k: int, **changes: Any) -> Decoder:
    """One model of that grid, Mixtral's architecture: 16 blocks, experts 2 dim wide, plain attention, head of its own.

    The vocabulary, 99487, and the heads, 64 wide, are inferred: with them counting gives the published names.
    changes: fields of Decoder. Source: brief 39; for the weights see `convert.load`.
    """
    made = Decoder(
        vocab_size=99_487,
        dim=dim,
        num_layers=16,
        attention=Attention(num_heads=max(1, dim // 64)),
        moe=MoELayer(num_experts=num_experts, router=Router(select=TopK(k=top_k)), experts=Gated(width=2 * dim)),
        norm=RMSNorm(eps=1e-5),
        context=4096,
    )
    return made.replace(**changes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """What counting says of a decoder. total, active: parameters. flops: forward matrix FLOPs per token.

    num_experts, top_k: of its routed layers, sums over them divided by their number (0 without). sparsity: 1 - K / E,
    0 where there is no routed layer. tokens_per_parameter: training tokens over total parameters, where they are known.
    """

    name: str
    dim: int
    num_layers: int
    num_experts: float
    top_k: float
    total: int
    active: int
    flops: int
    sparsity: float
    tokens_per_parameter: float | None = None


def size_of(config: Decoder, tokens: float | None = None, seq_len: int = 1, name: str = "") -> Size:
    """The size of a decoder. tokens: it is trained on; seq_len: for which attention is counted."""
    experts, k = _experts(config)
    counted = _counted(config, seq_len)
    return Size(
        name=name or _name(config, counted),
        dim=config.dim,
        num_layers=config.num_layers,
        num_experts=experts,
        top_k=k,
        total=counted.params,
        active=counted.active,
        flops=counted.flops,
        sparsity=sparsity(config),
        tokens_per_parameter=None if tokens is None else tokens / counted.params,
    )


def optimal_sparsity_grid() -> dict[str, Decoder]:
    """All models of the published grid with K below E, as "d512-E8-k2" -> config; see `size_name` for whole names."""
    grid = itertools.product(*OPTIMAL_SPARSITY.values())
    return {f"d{d}-E{e}-k{k}": optimal_sparsity(d, e, k) for d, e, k in grid if k < e}


def size_table(configs: Iterable[Decoder], tokens: float | None = None, seq_len: int = 1) -> list[Size]:
    """The sizes of these decoders, in their order. tokens: that each is trained on (the paper: 125e9)."""
    return [size_of(c, tokens, seq_len) for c in configs]


def size_name(config: Decoder) -> str:
    """The name of a model in the published style: d512-E8-k2-320M-A170M; of a dense one d512-320M."""
    return _name(config, _counted(config))


def _name(config: Decoder, counted: Cost) -> str:
    experts, k = _experts(config)
    total, active = short_count(counted.params), short_count(counted.active)
    if not experts:
        return f"d{config.dim}-{total}"
    return f"d{config.dim}-E{experts:g}-k{k:g}-{total}-A{active}"


def _counted(config: Decoder, seq_len: int = 1) -> Cost:
    """Everything at once, from models on the meta device: of one and of two blocks where all blocks are equal."""
    import torch

    from ..core.account import cost

    blocks = config.resolved()
    several = len(blocks) > 2 and all(block == blocks[0] for block in blocks)
    with torch.device("meta"):
        if not several:
            return cost(config.build(), seq_len)
        one, two = (cost(_first(config, n).build(), seq_len) for n in (1, 2))
    return type(one)(*(a + (b - a) * (len(blocks) - 1) for a, b in zip(one, two)))


def _first(config: Decoder, n: int) -> Decoder:
    """The first n blocks alone."""
    parts = {name: getattr(config, name) for name in ("blocks", "layout", "num_experts")}
    return config.replace(num_layers=n, **{name: None if part is None else part[:n] for name, part in parts.items()})


def short_count(count: float) -> str:
    """A number with two significant digits: 168_987_136 -> "170M", 1.88e9 -> "1.9B"."""
    if not count > 0:
        raise UserError(f"short_count: a count is positive, found {count}")
    rounded = float(f"{count:.1e}")
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if rounded >= unit:
            value = rounded / unit
            return f"{value:.1f}{letter}" if value < 10 and round(value, 1) % 1 else f"{value:.0f}{letter}"
    return f"{rounded:.0f}"


def sparsity(config: Decoder) -> float:
    """1 - K / E over all routed layers (sum of K over sum of E); 0 for a dense model."""
    experts, k = _experts(config)
    return 1 - k / experts if experts else 0.0


def tokens_per_parameter(config: Decoder, tokens: float) -> float:
    """Training tokens over total parameters, TPP."""
    return tokens / config.num_params()


def _experts(config: Decoder) -> tuple[float, float]:
    """Means over routed layers of E and of the experts that a token meets."""
    routed = [b.ffn for b in config.resolved() if isinstance(b.ffn, MoELayer)]
    if not routed:
        return 0.0, 0.0
    chosen = [_top_k(layer) for layer in routed]
    return sum(layer.num_experts for layer in routed) / len(routed), sum(chosen) / len(routed)


def _top_k(layer: MoELayer) -> float:
    select: Any = getattr(layer.router, "select", None)
    while hasattr(select, "inner"):
        select = select.inner
    k = getattr(select, "k", None)
    if isinstance(k, int | float):
        return float(k)
    import torch

    from ..moe.expected import expected_k

    with torch.device("meta"):
        return float(expected_k(layer.router.build(dim=8, num_experts=layer.num_experts)))


def iso_compute(
    base: Decoder,
    num_experts: Iterable[int],
    top_k: Iterable[int],
    flops: float | None = None,
    seq_len: int | None = None,
    width_step: int = 8,
) -> dict[str, Decoder]:
    """Configs of equal active FLOPs for every E and K with K <= E: experts are as wide as the budget leaves room for.

    base: a decoder with routed layers of one kind (`moe`) whose everything else stays. flops: forward matrix FLOPs per
    token at sequences of seq_len tokens (default: the context); None = those of `base`. Routers count, so that more
    experts are a little narrower; weights over one choice are raw probabilities. Widths are multiples of `width_step`,
    or of 4, 2 or 1 where that is needed to come within 1 percent. Returns name ("E8-k2") -> config. Raises `UserError`
    where no width comes so close.
    """
    if base.moe is None or not isinstance(base.moe.experts, Gated):
        raise UserError("iso_compute: the base needs `moe` with gated experts")
    if not isinstance(base.moe.router, Router) or not isinstance(base.moe.router.select, TopK):
        raise UserError("iso_compute: the base's router must select a top k")
    seq_len = base.context if seq_len is None else seq_len
    budget = base.flops_per_token(seq_len) if flops is None else flops
    made: dict[str, Decoder] = {}
    for k, e in itertools.product(top_k, num_experts):
        if k <= e:
            made[f"E{e}-k{k}"] = _fitted(base, base.moe, e, k, budget, seq_len, width_step)
    return made


def _fitted(base: Decoder, moe: MoELayer, e: int, k: int, budget: float, seq_len: int, width_step: int) -> Decoder:
    assert isinstance(moe.router, Router)
    weigh = moe.router.weigh
    if k == 1 and isinstance(weigh, Renormalised | SoftmaxKept):
        weigh = Raw()  # renormalised over one choice it would be 1 and teach the router nothing
    router = moe.router.replace(select=TopK(k=k), weigh=weigh)

    def of(width: int) -> Decoder:
        layer = moe.replace(num_experts=e, router=router, experts=moe.experts.replace(width=width))
        return base.replace(moe=layer, num_experts=None)

    one = of(1).flops_per_token(seq_len)
    each = of(2).flops_per_token(seq_len) - one
    exact = 1 + (budget - one) / each
    for step in (width_step, 4, 2, 1):
        width = step * round(exact / step)
        if step <= width_step and width >= 1 and abs(one + (width - 1) * each - budget) <= TOLERANCE * budget:
            return of(width)
    raise UserError(
        f"iso_compute: E {e} and K {k} leave experts {exact:.2f} wide for {budget:g} FLOPs per token, and no whole "
        "width comes within 1 percent; raise the budget or take fewer experts"
    )
