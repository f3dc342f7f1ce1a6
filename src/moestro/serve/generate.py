"""Text generation, with decoders and with encoder-decoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

from torch import nn

from ..models.encoder_decoder import EncoderDecoder
from .loop import Generated, Ids, go_on, read_prompts
from .translate import translate

__all__ = ["Generated", "generate"]


@overload
def generate(
    model: nn.Module,
    prompt: Ids,
    max_new_tokens: int = ...,
    *,
    temperature: float = ...,
    top_p: float = ...,
    top_k: int | None = ...,
    seed: int = ...,
    stop: Sequence[int | Sequence[int]] = ...,
    stream: Callable[[int, int], None] | None = ...,
    knobs: Mapping[str, Any] | None = ...,
) -> Generated: ...


@overload
def generate(
    model: nn.Module,
    prompt: Sequence[Ids],
    max_new_tokens: int = ...,
    *,
    temperature: float = ...,
    top_p: float = ...,
    top_k: int | None = ...,
    seed: int | Sequence[int] = ...,
    stop: Sequence[int | Sequence[int]] = ...,
    stream: Callable[[int, int], None] | None = ...,
    knobs: Mapping[str, Any] | None = ...,
) -> list[Generated]: ...


def generate(
    model: nn.Module,
    prompt: Ids | Sequence[Ids],
    max_new_tokens: int = 128,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int | Sequence[int] = 0,
    stop: Sequence[int | Sequence[int]] = (),
    stream: Callable[[int, int], None] | None = None,
    knobs: Mapping[str, Any] | None = None,
) -> Generated | list[Generated]:
    """Continue a prompt, token ids [S], or several of different lengths (padded on the left, padding is never seen).

    temperature 0 takes the most probable token (ties: the lower id); otherwise tokens are drawn from softmax(logits /
    temperature), cut to the top_k most probable and to the fewest that hold top_p of the probability. A draw is a hash
    of (seed, position): it depends neither on the batch nor on what was drawn before. Give one seed per prompt for
    several samples of the same prompt. stop: token ids, or sequences of ids; they are not part of the result.
    stream: called with (number of the prompt, token) as soon as a token is certain to be part of the result.
    knobs: call-time values of routers, as in `Signals.knobs`; {"experts": "all"} averages all experts of every layer.

    Generation ends when the context is full: positions beyond it were never trained. Raises `UserError` for an empty
    prompt, a prompt longer than the context, ids outside the vocabulary and impossible sampling settings.

    For an encoder-decoder the prompt is the source, and the result its target: see `serve.translate`.
    """
    how = (temperature, top_p, top_k, seed, stop, stream, knobs)
    if isinstance(model, EncoderDecoder):
        return translate(model, prompt, max_new_tokens, (), *how)
    single, prompts = read_prompts(prompt)
    made = go_on(model, prompts, max_new_tokens, *how)
    return made[0] if single else made
