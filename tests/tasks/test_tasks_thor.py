"""The checks of brief 02 (THOR) that are not in test_tasks_objectives, R-Drop as its case of one expert, and draws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from moestro.core.errors import UserError
from moestro.core.signals import Signals
from moestro.losses.consistency import symmetric_kl
from moestro.models import Decoder
from moestro.routers.config import Random
from moestro.tasks import NextToken, Translate, TwoPass
from moestro.tasks.batches import Batch
from moestro.tasks.data.batches import TranslationBatch
from moestro.tasks.draws import Draws, over_draws
from moestro.tasks.predictions import Prediction
from moestro.testing.compare import assert_close
from moestro.train.presets.translation import thor_model, thor_router

B, N, S, V = 5, 6, 4, 23
SIZES: dict[str, Any] = {"dim": 12, "width": 16, "num_heads": 2, "vocab_size": V, "context": 16}


def batch() -> TranslationBatch:
    generator = torch.Generator().manual_seed(0)
    source, tokens = (torch.randint(3, V, (B, n), generator=generator) for n in (N, S))
    valid = torch.arange(S) < torch.tensor([4, 2, 3, 4, 1])[:, None]
    return TranslationBatch(
        source=source,
        source_valid=torch.arange(N) < torch.tensor([6, 3, 5, 6, 2])[:, None],
        source_unit_id=torch.arange(B * N),
        tokens=tokens,
        targets=torch.where(valid, tokens.roll(-1, 1), -1),
        valid=valid,
        domain=torch.zeros(B, dtype=torch.int64),
        unit_id=torch.arange(B * S),
    )


def drawn(model: Any, seed: int, objective: Any = None) -> dict[str, list[list[int]]]:
    """path -> the expert of every token, by sentence; padding is -1."""
    with torch.no_grad():
        trail = (objective or Translate().build())(model, batch(), Signals(seed=seed)).trail
    return {key.path: record.plan.expert.view(B, -1).tolist() for key, record in trail.items()}  # type: ignore[union-attr]


def seen(table: list[list[int]]) -> list[set[int]]:
    return [set(row) - {-1} for row in table]


def test_check_3_draws_repeat_and_are_uniform() -> None:
    """Brief 02, check 3: reproducible from the seed; over many steps 1/E each (chi-square, 3 degrees of freedom), in
    encoder and decoder independently (9 degrees of freedom)."""
    model = thor_model(4, **SIZES).build().train()
    assert drawn(model, 7) == drawn(model, 7)
    steps, pairs, one = 160, torch.zeros(4, 4), torch.ones(1, 1, dtype=torch.int64)
    assert all(len(set.union(*seen(table))) == 1 for table in drawn(model, 7).values())  # one per layer and batch
    for seed in range(steps):
        with torch.no_grad():
            trail = model(one, one, Signals(seed=seed))[2]
        source, target = (int(record.plan.expert) for record in trail.values())
        pairs[source, target] += 1
    for axis in (0, 1):
        assert float(((pairs.sum(axis) - steps / 4) ** 2 / (steps / 4)).sum()) < 16.3  # p = 0.001
    assert float(((pairs - steps / 16) ** 2 / (steps / 16)).sum()) < 37.7  # 15 degrees of freedom, p = 0.001


def test_check_4_only_the_drawn_expert_gets_a_gradient_in_a_pass() -> None:
    """Brief 02, check 4, for a single pass, in every layer; both passes: test_tasks_objectives."""
    model: Any = thor_model(4, **SIZES).build().train()
    Translate().build()(model, batch(), Signals(seed=5)).loss.backward()
    for path, table in drawn(model, 5).items():
        grad = model.get_submodule(path).experts.up.grad
        assert {e for e in range(4) if bool(grad[e].any())} == set.union(*seen(table))


def test_check_5_a_sentence_has_one_expert_in_translation() -> None:
    """Brief 02, check 5: all tokens of a sentence use one expert, different sentences may differ."""
    model = thor_model(4, **SIZES).build().eval()
    tables = [table for seed in range(4) for table in drawn(model, seed).values()]
    assert all(len(row) == 1 for table in tables for row in seen(table))
    assert any(len(set.union(*seen(table))) > 1 for table in tables)


def test_the_released_sentence_level_draws_by_position() -> None:
    """Brief 02, quirks: a mask of the length of the sentence, shared by all sentences."""
    router = thor_router(as_released=True)
    assert router.select == Random(level="batch", evaluation="sequence", as_released=True)
    model = thor_model(4, router, **SIZES).build()
    tables = [table for seed in range(4) for table in drawn(model.eval(), seed).values()]
    for table in tables:
        columns = [set(column) - {-1} for column in zip(*table)]
        assert all(len(column) <= 1 for column in columns)
    assert any(len(set.union(*seen(table))) > 1 for table in tables)
    assert all(len(set.union(*seen(table))) == 1 for table in drawn(model.train(), 0).values())


def test_r_drop_is_thor_with_one_expert() -> None:
    """Brief 02, relation: with E = 1 dropout is the only noise, L = CE1 + CE2 + alpha * CR of a dense model."""
    config = thor_model(1, dropout=0.2, **SIZES)
    assert config.encoder.moe is None
    model, objective = config.build().train(), TwoPass(inner=Translate(), alpha=3.0).build()
    got = objective(model, batch(), Signals(seed=2))
    assert not list(got.trail.items())
    logits = []
    for seed in (2, _second(2)):
        (said,), _ = Translate().build().predict(model, batch(), Signals(seed=seed))
        logits.append(said.logits)
    counted = batch().targets.reshape(-1) >= 0
    p, q = (t[counted].log_softmax(-1) for t in logits)
    smooth = [
        -(0.9 * t.gather(1, batch().targets.reshape(-1)[counted][:, None])[:, 0] + 0.1 * t.mean(1)) for t in (p, q)
    ]
    kl = ((p.exp() - q.exp()) * (p - q)).sum() / 2
    assert float(kl.detach()) > 0
    assert_close("loss", got.loss, smooth[0].sum() + smooth[1].sum() + 3.0 * kl, 1e-5)


def _second(seed: int) -> Any:
    from moestro.core.draws import fold

    return fold(seed, "pass.1")


# Over several draws -------------------------------------------------------------------------------------------------


class Said:
    """An objective whose predictions of three targets are p, q, p, q, ... by draw."""

    P, Q = torch.tensor([[math.log(3.0), 0.0]] * 4), torch.zeros(4, 2)

    def __init__(self) -> None:
        self.calls = 0

    def count(self, batch: Any) -> int:
        return 3

    def predict(self, model: Any, batch: Any, signals: Signals) -> Any:
        assert not model.training
        self.calls += 1
        logits = self.P if self.calls % 2 else self.Q
        return [Prediction(logits, torch.tensor([0, 0, -1, 1]))], None


def test_draws_by_hand() -> None:
    """p = (3/4, 1/4), q = (1/2, 1/2): nats (2 log 4/3 + log 4) / 3 and log 2; apart log(3) / 8 per target."""
    model = torch.nn.Linear(1, 1).train()
    found = over_draws(model, Said(), [None], (0, 1, 2))
    one, two = (2 * math.log(4 / 3) + math.log(4)) / 3, math.log(2)
    assert found.nats == pytest.approx((one, two, one))
    assert found.apart == pytest.approx((math.log(3) / 8,) * 2)
    assert found.mean == pytest.approx((2 * one + two) / 3)
    assert found.spread == pytest.approx(abs(one - two) / math.sqrt(3))  # deviations 1/3, 2/3, 1/3; squares sum to 2/3
    assert found.distance == pytest.approx(math.log(3) / 8)
    assert model.training
    alone = Draws((1.0,), ())
    assert (alone.mean, alone.spread, alone.distance) == (1.0, 0.0, 0.0)
    for batches, draws in (([], (0,)), ([None], ())):
        with pytest.raises(UserError, match="over_draws"):
            over_draws(model, Said(), batches, draws)


def test_draws_of_models() -> None:
    """Draws differ where experts do; with all experts asked for, or one expert, or no router, they do not."""
    model = thor_model(4, **SIZES).build()
    objective = TwoPass(inner=Translate()).build()
    found = over_draws(model, objective, [batch(), batch()], range(4))
    assert found.spread > 0 < found.distance
    assert over_draws(model, objective, [batch(), batch()], range(4)) == found
    logits = [Translate().build().predict(model.eval(), batch(), _as_drawn(draw))[0][0].logits for draw in (0, 1)]
    first = symmetric_kl(logits[0], logits[1], batch().targets.reshape(-1) >= 0).detach() / 14
    alone = over_draws(model, objective, [batch()], (0, 1))
    assert alone.apart[0] == pytest.approx(float(first), rel=1e-5)
    still = over_draws(model, objective, [batch()], range(3), {"experts": "all"})
    assert still.spread == pytest.approx(0.0, abs=1e-12)
    assert still.distance == pytest.approx(0.0, abs=1e-12)
    text = Batch(tokens=batch().source, targets=batch().source, unit_id=torch.arange(B * N), text_bytes=0.0)
    dense = Decoder(vocab_size=V, dim=8, num_layers=1, context=8).build()
    assert over_draws(dense, NextToken().build(), [text], (0, 1)).spread == 0.0


def _as_drawn(draw: int) -> Signals:
    from moestro.core.draws import fold

    return Signals(seed=fold(fold(draw, "draws"), 0))
