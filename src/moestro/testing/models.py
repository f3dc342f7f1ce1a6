"""`check_model`: what must hold for a decoder, an encoder or both together, whatever parts they are made of."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ..core.carry import Carry
from ..core.params import describe
from ..core.signals import Signals
from ..core.trail import Trail
from ..models.encoder import Encoder
from ..models.encoder_decoder import EncoderDecoder
from .compare import assert_close

__all__ = ["check_model"]


def check_model(config: Any, *, batch: int = 2, length: int = 12, steps: int = 20, causal: bool = True) -> None:
    """Build the model and run every check. config: of a Decoder, an Encoder or an EncoderDecoder.

    Finite loss; a gradient for every trained parameter and a nonzero one for every trained router; no logit changed by
    later tokens, in training, in evaluation and in cached decoding; padding neither seen nor answered; state dict round
    trip; counted parameters; a loss that falls in `steps` steps. An encoder has no order in time: instead, its first
    outputs must depend on the last token. The decoder of a pair is held to what is said of decoders, its source given;
    that source must matter, and padding in it must not.
    """
    from ..nn.init import initialise

    model = config.build()
    initialise(model, 0)
    vocab = config.decoder.vocab_size if isinstance(model, EncoderDecoder) else config.vocab_size
    tokens = torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(4))
    _check_count(config, model)
    _check_gradients(model, tokens)
    if isinstance(model, Encoder):
        _check_both_directions(model, tokens)
    elif causal:
        _check_causality(model, tokens)
        _check_cache(model, tokens)
    _check_padding(model, tokens)
    if isinstance(model, EncoderDecoder):
        _check_source(model, tokens)
    _check_round_trip(config, model, tokens)
    _check_learning(model, tokens, steps)


def signals_of(
    tokens: Tensor, valid: Tensor | None = None, start: int = 0, knobs: dict[str, Any] | None = None
) -> Signals:
    """Everything a router may ask for, for whole sequences."""
    B, S = tokens.shape
    position = (torch.arange(S) + start).repeat(B)
    return Signals(
        valid=None if valid is None else valid.reshape(-1),
        position=position,
        segment=torch.arange(B).repeat_interleave(S),
        token=tokens.reshape(-1),
        task=torch.zeros(B * S, dtype=torch.int64),
        label=tokens.reshape(-1) % 2,
        unit_id=(torch.arange(B)[:, None] * 1000 + torch.arange(start, start + S)[None]).reshape(-1),
        seed=9,
        progress=0.5,
        knobs=knobs or {},
    )


def _source(model: EncoderDecoder, batch: int) -> Tensor:
    """What the encoder of a pair reads, the same for every target."""
    vocab = model.config.encoder.vocab_size
    return torch.randint(0, vocab, (batch, 9), generator=torch.Generator().manual_seed(5))


def _run(model: nn.Module, tokens: Tensor, **kwargs: Any) -> tuple[Tensor, Trail]:
    """What the model says of whole sequences: logits; hidden states of an encoder."""
    signals = signals_of(tokens, **kwargs)
    if isinstance(model, EncoderDecoder):
        source = _source(model, tokens.shape[0])
        said, _, trail = model(source, tokens, signals, None, signals_of(source, knobs=kwargs.get("knobs")))
    else:
        said, _, trail = model(tokens, signals)
    return said, trail


def _logits(model: nn.Module, tokens: Tensor, **kwargs: Any) -> Tensor:
    return _run(model, tokens, **kwargs)[0]


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Of the next token; of an encoder, which has seen it, of the token at the mirrored place."""
    said, trail = _run(model, tokens)
    if isinstance(model, Encoder):
        said, targets = said @ model.embed.weight.t(), tokens.flip(1)
    else:
        said, targets = said[:, :-1], tokens[:, 1:]
    return nn.functional.cross_entropy(said.flatten(0, 1).float(), targets.flatten()) + trail.loss()


def _check_count(config: Any, model: nn.Module) -> None:
    real = sum(p.numel() for p in model.parameters())
    if config.num_params() != real:
        raise AssertionError(f"count: the config says {config.num_params()} parameters, the model has {real}")
    if not 0 < config.num_active_params() <= real:
        raise AssertionError(f"count: {config.num_active_params()} active of {real} parameters")


def _check_gradients(model: nn.Module, tokens: Tensor) -> None:
    model.train()
    model.zero_grad(set_to_none=True)
    loss = _loss(model, tokens)
    if not bool(torch.isfinite(loss)):
        raise AssertionError(f"loss: {float(loss.detach())} after initialisation")
    loss.backward()
    roles = describe(model)
    routers: dict[str, bool] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if roles[name].role == "router":
            # Parts that serve only some losses (noise) may be idle; the router as a whole may not.
            at = name.rsplit(".router.", 1)[0]
            routers[at] = routers.get(at, False) or (p.grad is not None and bool(p.grad.any()))
        elif p.grad is None:
            raise AssertionError(f"gradient: {name} received none")
        if p.grad is not None and not bool(torch.isfinite(p.grad).all()):
            raise AssertionError(f"gradient: {name} received a NaN or an infinity")
    for at, reached in routers.items():
        if not reached:
            raise AssertionError(f"gradient: the router of {at} received only zeros")


def _check_both_directions(model: Encoder, tokens: Tensor) -> None:
    model.eval()
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 7
    with torch.no_grad():
        before, after = _logits(model, tokens)[:, 0], _logits(model, changed)[:, 0]
    if bool((before == after).all(-1).any()):
        raise AssertionError("both directions: an output of the first token does not depend on the last token")


def _check_source(model: EncoderDecoder, tokens: Tensor) -> None:
    """Every logit depends on the source, and on nothing of its padding."""
    model.eval()
    source = _source(model, tokens.shape[0])
    valid = torch.ones_like(source, dtype=torch.bool)
    valid[-1, 6:] = False

    def logits(of: Tensor) -> Tensor:
        return model(of, tokens, signals_of(tokens), None, signals_of(of, valid))[0]

    with torch.no_grad():
        want = logits(source)
        loud = torch.where(valid, source, (source + 1) % 7)
        assert_close("padding of the source: logits", logits(loud), want, 1e-5)
        valid[:, 6:] = False
        short = source[:, :6]
        alone = model(short, tokens, signals_of(tokens), None, signals_of(short))[0]
        assert_close("padding of the source: logits without it", logits(source), alone, 1e-4)
        valid[:] = True
        want = logits(source)
        other = logits((source + 1) % 7)
    if bool((other == want).all(-1).any()):
        raise AssertionError("source: a logit of the target does not depend on it")


def _check_causality(model: nn.Module, tokens: Tensor) -> None:
    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            before = _logits(model, tokens)
            for t in (1, tokens.shape[1] // 2, tokens.shape[1] - 1):
                changed = tokens.clone()
                changed[-1, t:] = (changed[-1, t:] + 1) % 7
                after = _logits(model, changed)
                mode = "training" if training else "evaluation"
                assert_close(
                    f"causality in {mode}, change at {t}: logits before it", after[-1, :t], before[-1, :t], 1e-5
                )
                assert_close(f"causality in {mode}: earlier sequences", after[:-1], before[:-1], 1e-5)


def _check_cache(model: nn.Module, tokens: Tensor) -> None:
    """Prefill of one half and then token by token equals the whole at once.

    Limits get room for everybody: a capacity counts the units of one call, so it differs between calls by definition.
    """
    roomy = {"capacity_factor": 1000.0}
    model.eval()
    with torch.no_grad():
        want = _logits(model, tokens, knobs=roomy)
        half = tokens.shape[1] // 2
        carry: Carry = model.new_cache(tokens.shape[1])  # type: ignore[operator]
        memory: tuple[Any, ...] = ()
        if isinstance(model, EncoderDecoder):
            source = _source(model, tokens.shape[0])
            memory = (model.encode(source, signals_of(source, knobs=roomy))[0],)
        call: Any = model.decode if isinstance(model, EncoderDecoder) else model
        parts = []
        for start, stop in [(0, half), *((t, t + 1) for t in range(half, tokens.shape[1]))]:
            part = tokens[:, start:stop]
            got, carry, _ = call(part, *memory, signals_of(part, start=start, knobs=roomy), carry)
            parts.append(got)
            memory = (None,) if memory else ()  # from here on it is in the carry
    assert_close("cached decoding", torch.cat(parts, dim=1), want, 1e-4)


def _check_padding(model: nn.Module, tokens: Tensor) -> None:
    model.eval()
    with torch.no_grad():
        S = tokens.shape[1]
        valid = torch.ones_like(tokens, dtype=torch.bool)
        valid[-1, S // 2 :] = False
        logits = _logits(model, tokens, valid=valid)
        other = tokens.clone()
        other[-1, S // 2 :] = (other[-1, S // 2 :] + 1) % 7
        loud = _logits(model, other, valid=valid)
    assert_close("padding: logits of valid tokens", loud[valid], logits[valid], 1e-5)
    if not bool(torch.isfinite(logits).all()):
        raise AssertionError("padding: a NaN or an infinity among the logits")


def _check_round_trip(config: Any, model: nn.Module, tokens: Tensor) -> None:
    other = config.build()
    missing = other.load_state_dict(model.state_dict())
    assert not missing.missing_keys
    model.eval()
    other.eval()
    with torch.no_grad():
        assert_close("round trip through state_dict", _logits(other, tokens), _logits(model, tokens), 0.0)
    again = type(config).from_dict(config.to_dict())
    if again != config:
        changed = [f.name for f in dataclasses.fields(config) if getattr(again, f.name) != getattr(config, f.name)]
        raise AssertionError(f"round trip of the config changed {', '.join(changed)}")


def _check_learning(model: nn.Module, tokens: Tensor, steps: int) -> None:
    model = copy.deepcopy(model).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    first = last = float("nan")
    for step in range(steps):
        optimiser.zero_grad(set_to_none=True)
        loss = _loss(model, tokens)
        loss.backward()
        optimiser.step()
        last = float(loss.detach())
        first = last if step == 0 else first
    if not last < 0.9 * first:
        raise AssertionError(f"learning: the loss went from {first:.3f} to {last:.3f} in {steps} steps on one batch")
