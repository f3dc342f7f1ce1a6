"""Generation with an encoder-decoder: the source is read once, the target is written from caches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ..core.carry import Carry
from ..core.errors import UserError
from ..core.pytree import changed
from ..core.signals import Signals
from ..core.trail import Trail
from ..models.encoder_decoder import EncoderDecoder
from ..nn.cross import Memory
from .loop import Generated, Ids, evaluating, go_on, read_prompts, seeds_of, sequences

__all__ = ["Beam", "beam_search", "read_source", "translate"]


class Writer(nn.Module):
    """The decoder of a model over given memories, with the call of a language model."""

    def __init__(self, model: EncoderDecoder, memory: Memory) -> None:
        super().__init__()
        self.model, self.memory, self.config = model, memory, model.config.decoder

    def forward(self, tokens: Tensor, signals: Signals, carry: Carry) -> tuple[Tensor, Carry, Trail]:
        return self.model.decode(tokens, self.memory, signals, carry)

    def new_cache(self, capacity: int | None = None) -> Carry:
        return self.model.new_cache(capacity)


def translate(
    model: EncoderDecoder,
    source: Ids | Sequence[Ids],
    max_new_tokens: int = 128,
    prefix: Ids = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int | Sequence[int] = 0,
    stop: Sequence[int | Sequence[int]] = (),
    stream: Callable[[int, int], None] | None = None,
    knobs: Mapping[str, Any] | None = None,
) -> Generated | list[Generated]:
    """Write the target of a source, token ids [N], or of several of different lengths (their padding is never seen).

    The decoder reads the model's start token and then `prefix`, neither of which is part of the result. Everything else
    is as in `serve.generate.generate`. Routers that draw do so by the source's seed and the token's place: the same
    alone and in a batch. Seeds of their own let sources draw apart.
    """
    single, sources = read_prompts(source)
    with evaluating(model), torch.no_grad():
        writer = Writer(model, read_source(model, sources, seed, knobs))
        begin = torch.tensor([model.config.start, *torch.as_tensor(prefix, dtype=torch.int64).tolist()])
        prompts = [begin] * len(sources)
        made = go_on(writer, prompts, max_new_tokens, temperature, top_p, top_k, seed, stop, stream, knobs)
    return made[0] if single else made


def read_source(
    model: EncoderDecoder,
    sources: Sequence[Tensor],
    seed: int | Sequence[int] = 0,
    knobs: Mapping[str, Any] | None = None,
) -> Memory:
    """What the encoder makes of sources [N] each, padded on the right. seed: of random routers, one or one per source.

    Raises `UserError` for empty ones, too long ones, and ids outside the vocabulary.
    """
    config = model.config.encoder
    for i, ids in enumerate(sources):
        where = f"source {i}" if len(sources) > 1 else "the source"
        if not len(ids):
            raise UserError(f"generate: {where} is empty; give at least one token")
        if len(ids) > config.context:
            raise UserError(f"generate: {where} has {len(ids)} tokens, the encoder's context is {config.context}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= config.vocab_size:
            wrong = low if low < 0 else high
            raise UserError(f"generate: {where} has the token {wrong}, the vocabulary is 0..{config.vocab_size - 1}")
    longest = max(len(ids) for ids in sources)
    tokens = torch.zeros(len(sources), longest, dtype=torch.int64)
    valid = torch.zeros(len(sources), longest, dtype=torch.bool)
    for i, ids in enumerate(sources):
        tokens[i, : len(ids)] = ids
        valid[i, : len(ids)] = True
    device = model.decoder.embed.weight.device
    mask = None if bool(valid.all()) else valid.to(device).view(-1)
    seeds = torch.tensor(seeds_of(seed, len(sources)), device=device)
    units = seeds[:, None] << 32 | torch.arange(longest, device=device)
    signals = Signals(valid=mask, unit_id=units.reshape(-1), knobs=knobs or {}, quiet=True)
    memory, _, _ = model.encode(tokens.to(device), signals)
    return memory


class Beam(NamedTuple):
    """One finished target. tokens: [N] int64, without what it began with and what stopped it. score: the sum of the
    log-probabilities of its new tokens, the stop token's included, divided by their number ** length_penalty. reason:
    "stop" a stop token, "length" max_new_tokens, "context" the context is full."""

    tokens: Tensor
    score: float
    reason: Literal["stop", "length", "context"]


def beam_search(
    model: EncoderDecoder,
    source: Ids | Sequence[Ids],
    max_new_tokens: int = 128,
    *,
    beams: int = 4,
    length_penalty: float = 1.0,
    prefix: Ids = (),
    stop: Sequence[int] = (),
    seed: int | Sequence[int] = 0,
    knobs: Mapping[str, Any] | None = None,
) -> list[Beam] | list[list[Beam]]:
    """The best targets of a source, or of each of several, best first, at most `beams` of each.

    At every step the `beams` best unfinished targets go on; equal scores: the earlier target, then the lower token. A
    source is done when no unfinished target can overtake the `beams` finished ones any more. length_penalty: the power
    of the length that sums are divided by; 0 = none, which favours short targets. stop: token ids that end a target.
    seed, knobs: as in `translate`; all targets of a source draw the same experts. Raises `UserError` for impossible
    settings, and for sources as `translate`.
    """
    if beams < 1 or max_new_tokens < 1:
        raise UserError(f"beam_search: needs beams >= 1 and max_new_tokens >= 1, not {beams} and {max_new_tokens}")
    ends = sorted(end for (end,) in _single(stop))
    single, sources = read_prompts(source)
    with evaluating(model), torch.no_grad():
        done = _search(model, sources, max_new_tokens, beams, length_penalty, prefix, ends, seed, knobs or {})
    return done[0] if single else done


def _single(stop: Sequence[int]) -> list[tuple[int, ...]]:
    made = sequences(stop)
    if any(len(s) != 1 for s in made):
        raise UserError("beam_search: stops at single tokens only; give token ids")
    return made


def _search(
    model: EncoderDecoder,
    sources: list[Tensor],
    wanted: int,
    beams: int,
    penalty: float,
    prefix: Ids,
    ends: list[int],
    seed: int | Sequence[int],
    knobs: Mapping[str, Any],
) -> list[list[Beam]]:
    B, W = len(sources), beams
    memory = read_source(model, sources, seed, knobs)
    device, V = memory.states.device, model.config.decoder.vocab_size
    rows = torch.arange(B, device=device).repeat_interleave(W)
    seeds = torch.tensor(seeds_of(seed, B), device=device).repeat_interleave(W)
    memory = Memory(*(None if t is None else t.index_select(0, rows) for t in (memory.states, memory.valid)))  # type: ignore[arg-type]
    begin = [model.config.start, *torch.as_tensor(prefix, dtype=torch.int64).tolist()]
    limit = min(wanted, model.config.decoder.context - len(begin) + 1)
    if limit < 1:
        raise UserError(f"beam_search: a prefix of {len(begin) - 1} tokens leaves no room in the decoder's context")
    tokens = torch.tensor([begin] * (B * W), device=device)
    carry = model.new_cache(len(begin) + limit - 1)
    score = torch.full((B, W), -math.inf, dtype=torch.float64, device=device)
    score[:, 0] = 0.0  # all targets of a source are equal at first: one goes on
    written = torch.zeros(B, W, 0, dtype=torch.int64, device=device)
    finished: list[list[Beam]] = [[] for _ in range(B)]
    place = 0
    for step in range(1, limit + 1):
        spots = torch.arange(place, place + tokens.shape[1], device=device).expand(B * W, -1)
        signals = Signals(unit_id=(seeds[:, None] << 32 | spots).reshape(-1), knobs=knobs, quiet=True)
        logits, carry, _ = model.decode(tokens, memory if step == 1 else None, signals, carry)
        place += tokens.shape[1]
        logs = torch.log_softmax(logits[:, -1].double(), dim=-1)
        if bool(torch.isnan(logs).any()):
            raise UserError("generate: the model's logits are not finite; its weights are damaged or training diverged")
        reached = (score[:, :, None] + logs.view(B, W, V)).view(B, W * V)
        order = reached.sort(dim=-1, descending=True, stable=True)
        top = min(W * V, W * (1 + len(ends)))  # however many of them stop, W do not
        values, flat = order.values[:, :top], order.indices[:, :top]
        stops = torch.isin(flat % V, torch.tensor(ends, dtype=torch.int64, device=device))
        last = step == limit
        for b in range(B):
            places = range(W) if not last else range(min(top, W))
            for i in places:
                if values[b, i] == -math.inf or not (last or bool(stops[b, i])):
                    continue
                new = written[b, flat[b, i] // V]
                reason: Any = "stop" if bool(stops[b, i]) else ("length" if limit == wanted else "context")
                if reason != "stop":
                    new = torch.cat((new, flat[b, i : i + 1] % V))
                finished[b].append(Beam(new.cpu(), float(values[b, i]) / step**penalty, reason))
            finished[b] = sorted(finished[b], key=lambda beam: -beam.score)[:W]
        if last:
            break
        goes = torch.sort((~stops).to(torch.int8), dim=1, descending=True, stable=True).indices[:, :W]
        score, flat = values.gather(1, goes), flat.gather(1, goes)
        if all(_over(finished[b], float(score[b, 0]), step, limit, W, penalty) for b in range(B)):
            break
        parent, new = flat // V, flat % V
        written = torch.cat((written.gather(1, parent[..., None].expand(-1, -1, step - 1)), new[..., None]), dim=2)
        carry = _reordered(carry, (parent + torch.arange(B, device=device)[:, None] * W).view(-1))
        tokens = new.view(-1, 1)
    return finished


def _over(finished: list[Beam], best: float, step: int, limit: int, beams: int, penalty: float) -> bool:
    """Whether no unfinished target can come to be among the best. Sums only fall; lengths help at most to the limit."""
    if best == -math.inf:
        return True
    bound = best / (limit if penalty > 0 else step + 1) ** penalty
    return len(finished) == beams and bound <= finished[-1].score


def _reordered(carry: Carry, rows: Tensor) -> Carry:
    """The caches of these rows. Memories stay: all targets of a source have the same."""
    own = {}
    for name, state in carry.own.items():
        if not name.endswith(".cross"):
            state = _pytree.tree_map_only(Tensor, lambda t: t.index_select(0, rows), state)
        own[name] = state
    return changed(carry, own=own)
