"""Which tensor of the mixture comes from which of the sources, and how; and the mixture's config."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from ...core.errors import UserError
from ...experts.config import MLP, Experts, Gated
from ...models.config import Decoder
from ...moe.config import AttentionExperts, MoELayer
from ...nn.config import Attention, FeedForward, PlainFeedForward
from ...routers.config import All, Router, TopK
from ..change.conduct import choose
from ..change.graft import with_parts
from ..config import BranchAttendMix, Specialists

__all__ = ["Origin", "Rule", "attends", "chosen", "mixture", "origins", "rules"]

How = Literal["experts", "heads", "average", "new"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Tensors of the mixture whose whole name matches `ours`, and the name of theirs in every source.

    how: experts = stacked, one per source; heads = beside each other as the heads of attention experts; average = the
    mean of the sources; new = drawn at random. theirs refers to groups of `ours`.
    """

    ours: str
    how: How
    theirs: str = r"\g<0>"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where one tensor comes from. theirs: its name in every source; "" for new ones."""

    how: How
    theirs: str


_FFN = (
    Rule(r"(layers\.\d+\.ffn)\.experts\.(gate_up|up|down|up_bias|down_bias)", "experts", r"\1.\2"),
    Rule(r"layers\.\d+\.ffn\.router\.score\.weight", "new"),
)
_HEADS = (Rule(r"(layers\.\d+\.mixer)\.attention\.((?:q|k|v)\.(?:weight|bias)|o\.weight)", "heads", r"\1.\2"),)
_SHARED_KV = (
    Rule(r"(layers\.\d+\.mixer)\.attention\.((?:k|v)\.(?:weight|bias))", "average", r"\1.\2"),
    Rule(r"(layers\.\d+\.mixer)\.attention\.(q\.(?:weight|bias)|o\.weight)", "heads", r"\1.\2"),
)
_ATTENTION = (
    Rule(r"(layers\.\d+\.mixer)\.attention\.(sinks|relative\.table)", "heads", r"\1.\2"),
    # What attention experts have in common: the norms of heads, and a bias that is added after the gates.
    Rule(r"(layers\.\d+\.mixer)\.attention\.((?:q|k)_norm\.weight|o\.bias)", "average", r"\1.\2"),
    Rule(r"layers\.\d+\.mixer\.router\.score\.weight", "new"),
)
_REST = (Rule(r".*", "average"),)


def attends(options: Specialists) -> bool:
    """Whether attention becomes experts too."""
    return isinstance(options, BranchAttendMix)


def rules(options: Specialists) -> tuple[Rule, ...]:
    """The method's table. The first rule that matches a name counts."""
    if not isinstance(options, BranchAttendMix):
        return (*_FFN, *_REST)
    return (*_FFN, *(_SHARED_KV if options.shared_kv else _HEADS), *_ATTENTION, *_REST)


def origins(
    options: Specialists, ours: Mapping[str, Tensor], theirs: Sequence[Mapping[str, Tensor]]
) -> dict[str, Origin]:
    """Name of every tensor of the mixture -> where it comes from.

    Raises `UserError` naming tensors of the mixture that no source has, and those of a source that nothing uses.
    """
    table, found = rules(options), {}
    for name in ours:
        for rule in table:
            if match := re.fullmatch(rule.ours, name):
                found[name] = Origin(rule.how, "" if rule.how == "new" else match.expand(rule.theirs))
                break
    used = {o.theirs for o in found.values()}
    for i, tensors in enumerate(theirs):
        missing, extra = sorted(used - {""} - tensors.keys()), sorted(tensors.keys() - used)
        if missing or extra:
            what = f"has no {missing[0]}" if missing else f"has {extra[0]}, which has no place in the mixture"
            raise UserError(f"{type(options).__name__}: source {i} {what}")
    return found


def chosen(options: Specialists, config: Any) -> list[int]:
    """Numbers of the blocks that get experts. Raises `UserError` for a model with routed layers."""
    blocks = config.resolved()
    routed = [i for i, b in enumerate(blocks) if isinstance(b.ffn, MoELayer)]
    if routed:
        raise UserError(f"{type(options).__name__}: layers.{routed[0]}.ffn is routed already; give dense models")
    return choose(list(range(len(blocks))), options.layers, "block")


def mixture(options: Specialists, config: Decoder, sources: int) -> Decoder:
    """The config of the mixture of that many dense models of this config.

    Raises `UserError` for options and parts that do not go together.
    """
    name, count = type(options).__name__, sources + options.extra
    if sources < 2:
        raise UserError(f"{name}: takes several models, found {sources}")
    if options.top_k > count:
        raise UserError(f"{name}.top_k: {options.top_k} of {count} experts")
    numbers, blocks = chosen(options, config), config.resolved()
    select = Router(select=TopK(k=options.top_k), weigh=options.weights(options.top_k, options.weigh))
    ffns = {}
    for i in numbers:
        bank = _bank(blocks[i].ffn, f"{name}: layers.{i}.ffn")
        ffns[i] = MoELayer(num_experts=count, router=select, experts=bank, losses=options.losses)
    mixers = {}
    if isinstance(options, BranchAttendMix):
        if config.relative_bias is not None:
            raise UserError(f"{name}: relative_bias is one table for the heads of all blocks; use BranchTrainMix (btx)")
        mixers = {i: _attentions(options, blocks[i].mixer, sources, f"{name}: layers.{i}.mixer") for i in numbers}
    return with_parts(config, ffns, mixers)  # type: ignore[return-value]


def _bank(ffn: Any, where: str) -> Experts:
    if isinstance(ffn, FeedForward):
        return Gated(width=ffn.width, activation=ffn.activation)
    if isinstance(ffn, PlainFeedForward):
        return MLP(width=ffn.width, activation=ffn.activation, bias=ffn.bias)
    raise UserError(f"{where}: a {type(ffn).__name__} cannot become an expert")


def _attentions(options: BranchAttendMix, mixer: Any, sources: int, where: str) -> AttentionExperts:
    if not isinstance(mixer, Attention):
        raise UserError(
            f"{where}: a {type(mixer).__name__} cannot become an attention expert; use BranchTrainMix (btx)"
        )
    if mixer.qk_norm == "full":
        raise UserError(
            f"{where}: qk_norm 'full' would be one norm over the heads of all experts; use BranchTrainMix (btx)"
        )
    k = options.attention_top_k
    if k is not None and k > sources:
        raise UserError(f"{type(options).__name__}.attention_top_k: {k} of {sources} attention experts")
    weigh = options.weights(1 if k is None else k, options.attention_weigh)
    router = Router(select=All() if k is None else TopK(k=k), weigh=weigh)
    return AttentionExperts(num_experts=sources, attention=mixer, router=router, shared_kv=options.shared_kv)
