"""Dropout in stacks: what is dropped, for whom it is the same, and that it is off in evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.core.draws import fold
from moestro.core.errors import UserError
from moestro.core.signals import Signals
from moestro.models import Block, Decoder, ParallelBlock, encoder_decoders, encoders, examples
from moestro.nn.dropout import dropout
from moestro.testing.compare import assert_close
from moestro.testing.models import check_model

B, S = 2, 9


def tokens() -> Tensor:
    return torch.randint(0, 37, (B, S), generator=torch.Generator().manual_seed(0))


def test_entries_are_dropped_or_grow() -> None:
    x, unit = torch.ones(400, 50), torch.arange(400)
    y = dropout(x, 0.25, 7, unit)
    assert y.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert float((y == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert torch.equal(dropout(x[:7], 0.25, 7, unit[:7]), y[:7]), "a unit's draws do not depend on the batch"
    assert not torch.equal(dropout(x, 0.25, 8, unit), y)


def test_a_block_by_hand() -> None:
    block = Block(mixer=examples()["dense"].attention, ffn=examples()["dense"].ffn, dropout=0.5).build(16)
    h, signals = torch.randn(B, S, 16), Signals(seed=3, unit_id=torch.arange(B * S) + 100)
    y, _, _ = block.train()(h, signals, _carry())
    mixed, _ = block.mixer(block.mixer_norm(h), signals, None)
    half = h + dropout(mixed, 0.5, fold(3, "dropout.mixer"), torch.arange(B * S) + 100)
    want = half + dropout(block.ffn(block.ffn_norm(half))[0], 0.5, fold(3, "dropout.ffn"), torch.arange(B * S) + 100)
    assert_close("y", y, want, 1e-6)


def _carry() -> Any:
    from moestro.core.carry import Carry

    return Carry()


@pytest.mark.parametrize(
    "config", [examples()["moe"], examples()["dense"], encoders()["t5"], encoders()["bert"]], ids=lambda c: c.kinds()[0]
)
def test_seeds_rows_and_evaluation(config: Any) -> None:
    model, plain = config.replace(dropout=0.3).build(), config.build()
    x = tokens()
    with torch.no_grad():
        assert torch.equal(model.eval()(x)[0], plain.eval()(x)[0])
        model.train()
        one, again, other = (model(x, Signals(seed=s))[0] for s in (1, 1, 2))
        assert torch.equal(one, again)
        assert not torch.allclose(one, other)
        twice = model(x[:1].expand(2, -1), Signals(seed=1))[0]
        assert not torch.allclose(twice[0], twice[1]), "rows draw for themselves"
        whole = model.run(model.embed(x), Signals(seed=1))[0]
        h, carry, _ = model.run(model.embed(x), Signals(seed=1), None, 0, 1)
        assert torch.equal(model.run(h, Signals(seed=1), carry, 1)[0], whole)


def test_recomputation_draws_the_same() -> None:
    results = []
    for save in (False, True):
        model = examples()["moe"].replace(dropout=0.3, checkpoint=save).build().train()
        total, _, _, trail = model.loss(tokens(), tokens().roll(-1, 1), Signals(seed=4))
        (total + trail.loss()).backward()
        results.append({n: p.grad for n, p in model.named_parameters()})
    for name, grad in results[0].items():
        assert_close(name, results[1][name], grad, 1e-6)


def test_the_suite_with_dropout() -> None:
    check_model(examples()["parallel"].replace(blocks=(ParallelBlock(dropout=0.1),) * 2))
    pair = encoder_decoders()["t5"]
    sides = {"encoder": pair.encoder.replace(dropout=0.1), "decoder": pair.decoder.replace(dropout=0.1)}
    check_model(pair.replace(**sides))


def test_impossible_shares() -> None:
    for share in (-0.1, 1.0):
        with pytest.raises(UserError, match=r"Decoder\.dropout"):
            Decoder(dropout=share)
        with pytest.raises(UserError, match=r"Block\.dropout"):
            Block(dropout=share)


def test_blocks_that_are_listed_say_their_own() -> None:
    """The stack's share is then that of its embeddings."""
    blocks = {"moe": None, "blocks": (Block(dropout=0.2), Block())}
    config = examples()["dense"].replace(dropout=0.5, **blocks)
    assert [block.dropout for block in config.build().layers] == [0.2, 0.0]
    model, h, signals = config.replace(blocks=(Block(), Block())).build().train(), torch.ones(B, S, 16), Signals(seed=1)
    unit = ((torch.arange(B) << 32)[:, None] + torch.arange(S)).view(-1)
    want = dropout(h, 0.5, fold(1, "dropout.embed"), unit)
    assert torch.equal(model.run(h, signals)[0], model.eval().run(want, signals)[0])
