"""`check_headed`: what must hold for an encoder with a head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.signals import Signals
from .compare import assert_close

__all__ = ["check_headed"]


def check_headed(config: Any) -> None:
    """Build the model and run every check. config: of a Headed.

    Counted parameters; a gradient for every trained parameter; every routed layer in the trail; padding, on either
    side, neither seen nor counted; an answer that depends on every token; round trips of weights and config; initial
    values that follow the seed.
    """
    model = config.build()
    real = sum(p.numel() for p in model.parameters())
    if config.num_params() != real:
        raise AssertionError(f"count: the config says {config.num_params()} parameters, the model has {real}")
    vocab = config.encoder.vocab_size
    tokens = torch.randint(0, vocab, (3, 7), generator=torch.Generator().manual_seed(1))
    _check_gradients(model, tokens)
    model.eval()
    with torch.no_grad():
        _check_padding(model, tokens)
        _check_tokens(model, tokens)
        _check_round_trips(config, model, tokens)


def _call(model: Any, tokens: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Any]:
    B, S = tokens.shape
    valid = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
    place = (valid.cumsum(1) - 1).clamp_min(0)
    row = torch.arange(B)[:, None].expand(B, S)
    signals = Signals(
        valid=valid.reshape(-1),
        position=place.reshape(-1),
        unit_id=(row * 1000 + place).reshape(-1),
        task=row.reshape(-1) % 2,
        label=row.reshape(-1) % 2,
        seed=9,
        progress=0.5,
    )
    C = model.config.features
    features = torch.stack([(tokens + c) % 3 for c in range(C)], dim=-1).float() if C else None
    said, _, trail = model(tokens, signals, None, features)
    return said, trail


def _check_gradients(model: nn.Module, tokens: Tensor) -> None:
    said, trail = _call(model.train(), tokens)
    routed = {path for path, m in model.named_modules() if hasattr(m, "router") and hasattr(m, "experts")}
    missing = routed - {key.path for key in trail}
    if missing:
        raise AssertionError(f"trail: {', '.join(sorted(missing))} left no record")
    (said.float().square().sum() + trail.loss()).backward()
    for name, p in model.named_parameters():
        if p.requires_grad and (p.grad is None or not bool(torch.isfinite(p.grad).all())):
            raise AssertionError(f"gradient: {name} received {'none' if p.grad is None else 'a NaN or an infinity'}")


def _check_padding(model: nn.Module, tokens: Tensor) -> None:
    want, alone = _call(model, tokens)
    for side, real in (("left", slice(4, None)), ("right", slice(0, 7))):
        wide = torch.ones(3, 11, dtype=torch.int64)
        wide[:, real] = tokens
        valid = torch.zeros_like(wide, dtype=torch.bool)
        valid[:, real] = True
        got, trail = _call(model, wide, valid)
        got = got[:, real] if got.ndim == 3 else got
        assert_close(f"padding on the {side}: what the head says", got, want, 1e-5)
        for path, count in alone.counts().items():
            if not torch.equal(trail.counts()[path], count):
                raise AssertionError(f"padding on the {side}: {path} counted it")


def _check_tokens(model: nn.Module, tokens: Tensor) -> None:
    want = _call(model, tokens)[0]
    for s in range(tokens.shape[1]):
        other = tokens.clone()
        other[:, s] = (other[:, s] + 1) % 7
        if bool((_call(model, other)[0] == want).flatten(1).all(1).any()):
            raise AssertionError(f"tokens: the answer does not depend on token {s}")


def _check_round_trips(config: Any, model: nn.Module, tokens: Tensor) -> None:
    other = config.replace(seed=config.seed + 1).build().eval()
    want = _call(model, tokens)[0]
    if torch.equal(_call(other, tokens)[0], want):
        raise AssertionError("seed: another one gives the same model")
    other.load_state_dict(model.state_dict())
    assert_close("round trip through state_dict", _call(other, tokens)[0], want, 0.0)
    other = config.build().eval()
    other.initialise(config.seed)
    assert_close("initialised again", _call(other, tokens)[0], _call(config.build().eval(), tokens)[0], 0.0)
    if type(config).from_dict(config.to_dict()) != config:
        raise AssertionError("round trip of the config changed it")
