"""The loop of generation: one pass over the prompts, then one token at a time from cached keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..core.carry import Carry
from ..core.errors import UserError
from ..core.signals import Signals
from ..core.trail import Trail
from ..models.decoder import Decoder
from .sampling import choose

__all__ = ["Generated", "Ids", "evaluating", "go_on", "read_prompts", "seeds_of", "sequences"]

Ids = Tensor | Sequence[int]


class _Model(Protocol):
    """What generation needs of a model; `models.decoder.Decoder` is one."""

    def __call__(self, tokens: Tensor, signals: Signals, carry: Carry) -> tuple[Tensor, Carry, Trail]: ...

    def new_cache(self, capacity: int | None = None) -> Carry: ...


class Generated(NamedTuple):
    """tokens: [N] int64, the new tokens without the prompt and without what stopped them.

    reason: why it ended: "stop" a stop token or sequence, "length" max_new_tokens, "context" the context is full.
    """

    tokens: Tensor
    reason: Literal["stop", "length", "context"]


def go_on(
    model: nn.Module,
    prompts: list[Tensor],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int | None,
    seed: int | Sequence[int],
    stop: Sequence[int | Sequence[int]],
    stream: Callable[[int, int], None] | None,
    knobs: Mapping[str, Any] | None = None,
) -> list[Generated]:
    """Continue prompts [S] each with a model that has the call of a decoder; for the arguments see `generate`."""
    config = model.config
    context, vocab = int(config.context), int(config.vocab_size)  # type: ignore[union-attr, arg-type]
    _check(prompts, context, vocab, max_new_tokens)
    seeds = seeds_of(seed, len(prompts))
    rows = [_Row(i, len(p), sequences(stop), stream) for i, p in enumerate(prompts)]
    limits = [min(max_new_tokens, context - len(p)) for p in prompts]
    with evaluating(model), torch.no_grad():
        _decode(model, prompts, rows, limits, max_new_tokens, seeds, (temperature, top_p, top_k), knobs or {})  # type: ignore[arg-type]
    return [row.result() for row in rows]


def seeds_of(seed: int | Sequence[int], number: int) -> list[int]:
    """One seed per prompt. Raises `UserError` where there are not as many."""
    seeds = [seed] * number if isinstance(seed, int) else list(seed)
    if len(seeds) != number:
        raise UserError(f"generate: {len(seeds)} seeds for {number} prompts; give one, or one per prompt")
    return seeds


def _decode(
    model: _Model,
    prompts: list[Tensor],
    rows: list[_Row],
    limits: list[int],
    wanted: int,
    seeds: list[int],
    sampling: tuple[float, float, int | None],
    knobs: Mapping[str, Any],
) -> None:
    device = next(model.parameters()).device  # type: ignore[attr-defined]
    for row, limit in zip(rows, limits):
        row.end_if(limit <= 0, "length" if wanted <= 0 else "context")
    longest = max(len(p) for p in prompts)
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for i, p in enumerate(prompts):
        tokens[i, longest - len(p) :] = p
    tokens = tokens.to(device)
    length = torch.tensor([len(p) for p in prompts], device=device)
    seed = torch.tensor(seeds, device=device)
    padded = len(prompts) > 1
    place = torch.arange(longest, device=device) - (longest - length)[:, None]  # [B, S], negative = padding
    carry = model.new_cache(longest + max(0, *limits))
    for step in range(max(limits)):
        if all(row.reason for row in rows):
            break
        position = place.clamp_min(0)
        signals = Signals(
            valid=(place >= 0).reshape(-1) if padded else None,
            position=position.reshape(-1) if padded else None,
            unit_id=(seed[:, None] << 32 | position).reshape(-1),
            knobs=knobs,
            quiet=True,
        )
        last, carry = _last_logits(model, tokens, signals, carry)
        if not math.isfinite(last.sum(dtype=torch.float64).item()):  # one infinity or NaN spoils the sum
            raise UserError("generate: the model's logits are not finite; its weights are damaged or training diverged")
        place = place[:, -1:] + 1
        new = choose(last, seed, place[:, 0], *sampling)
        tokens = new[:, None]
        for row, token, limit in zip(rows, new.tolist(), limits):
            row.add(token)
            row.end_if(step + 1 >= limit, "length" if limit == wanted else "context")


def _last_logits(model: _Model, tokens: Tensor, signals: Signals, carry: Carry) -> tuple[Tensor, Carry]:
    """Logits [B, V] of the last position: a decoder as it was written spares its head the other ones."""
    if isinstance(model, Decoder) and _as_written(model):
        h, carry, _ = model.hidden(tokens, signals, carry)
        return model.head(h[:, -1:].contiguous())[:, -1], carry
    logits, carry, _ = model(tokens, signals, carry)
    return logits[:, -1], carry


def _as_written(model: Decoder) -> bool:
    """Whether a call of the decoder is nothing but its `hidden` and its `head`."""
    if model._forward_hooks or model._forward_pre_hooks or model._compiled_call_impl:
        return False
    return getattr(model.forward, "__func__", None) is Decoder.forward


class _Row:
    """One prompt's new tokens. Tokens that may turn out to be the start of a stop sequence are held back."""

    def __init__(
        self, number: int, prompt: int, stops: list[tuple[int, ...]], stream: Callable[[int, int], None] | None
    ) -> None:
        self.number, self.prompt, self.stops, self.stream = number, prompt, stops, stream
        self.tokens: list[int] = []
        self.shown = 0
        self.reason: Literal["", "stop", "length", "context"] = ""

    def add(self, token: int) -> None:
        if self.reason:
            return
        self.tokens.append(token)
        for stop in self.stops:
            if tuple(self.tokens[-len(stop) :]) == stop:
                del self.tokens[-len(stop) :]
                self.reason = "stop"
                break
        self._show(0 if self.reason else self._held())

    def end_if(self, over: bool, reason: Literal["length", "context"]) -> None:
        if over and not self.reason:
            self.reason = reason
            self._show(0)

    def result(self) -> Generated:
        return Generated(torch.tensor(self.tokens, dtype=torch.int64), self.reason or "length")

    def _held(self) -> int:
        """How many of the last tokens are the beginning of a stop sequence."""
        most = 0
        for stop in self.stops:
            for n in range(min(len(stop) - 1, len(self.tokens)), most, -1):
                if tuple(self.tokens[-n:]) == stop[:n]:
                    most = n
                    break
        return most

    def _show(self, held: int) -> None:
        upto = len(self.tokens) - held
        if self.stream is not None:
            for token in self.tokens[self.shown : upto]:
                self.stream(self.number, token)
        self.shown = max(self.shown, upto)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, afterwards every module as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def read_prompts(prompt: Ids | Sequence[Ids]) -> tuple[bool, list[Tensor]]:
    """Whether it is one prompt, and the prompts, [S] int64 each on the CPU."""
    if isinstance(prompt, Tensor):
        if prompt.ndim == 1:
            return True, [prompt.to("cpu", torch.int64)]
        if prompt.ndim == 2:
            return False, [p.to("cpu", torch.int64) for p in prompt]
        raise UserError(f"generate: a prompt is [S] token ids, not {list(prompt.shape)}")
    if not len(prompt) or isinstance(prompt[0], int):
        return True, [torch.tensor(prompt, dtype=torch.int64)]
    return False, [torch.as_tensor(p, dtype=torch.int64, device="cpu") for p in prompt]


def sequences(stop: Sequence[int | Sequence[int]]) -> list[tuple[int, ...]]:
    """Every stop as a sequence of ids."""
    made = [(s,) if isinstance(s, int) else tuple(s) for s in stop]
    if not all(made):
        raise UserError("generate: an empty stop sequence would stop at once; leave it out")
    return made


def _check(prompts: list[Tensor], context: int, vocab: int, max_new_tokens: int) -> None:
    if max_new_tokens < 0:
        raise UserError(f"generate: max_new_tokens must not be negative, found {max_new_tokens}")
    for i, p in enumerate(prompts):
        where = f"prompt {i}" if len(prompts) > 1 else "the prompt"
        if not len(p):
            raise UserError(f"generate: {where} is empty; give at least one token")
        if len(p) > context:
            raise UserError(
                f"generate: {where} has {len(p)} tokens, the model's context is {context}; "
                f"shorten it to its last {context} tokens"
            )
        low, high = int(p.min()), int(p.max())
        if low < 0 or high >= vocab:
            raise UserError(
                f"generate: {where} has the token {low if low < 0 else high}, the vocabulary is 0..{vocab - 1}"
            )
